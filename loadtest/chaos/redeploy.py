"""`python -m loadtest.chaos.redeploy CONFIG`: applies a changed configuration to what is served.

What an operator does: the application is built of the new settings and handed to Serve, which
replaces what has changed while the rest goes on. To be run in the environment of the cluster.
"""

import os
import sys
from pathlib import Path

import yaml

from serving.config import Settings


def main() -> None:
    """Returns as soon as Serve has taken it."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    settings = Settings.model_validate(yaml.safe_load(text))
    import ray
    from ray import serve

    from serving.app import APP_NAME, build

    address = os.environ.get("RAY_ADDRESS", "auto")
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    serve.run_many(
        [serve.RunTarget(build(settings), name=APP_NAME, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


if __name__ == "__main__":
    main()
