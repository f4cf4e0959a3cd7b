"""`python -m loadtest.costs.serve FOLDER`: `expertline up` with paced ranks.

The folder holds `settings.json`; files of the server's own will lie in it, too.
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

from rich.console import Console

from deploy.local_ray import serve_environment
from deploy.up import up
from serving.config import Settings

SETTINGS = "settings.json"


def main() -> None:
    """Serves until SIGINT."""
    folder = Path(sys.argv[1])
    settings = Settings.model_validate_json((folder / SETTINGS).read_text(encoding="utf-8"))
    os.environ.update(serve_environment(folder))  # before Serve is imported, which reads it
    from loadtest.costs.paced_rank import PacedEngine
    from serving import app

    with patch.object(app, "Engine", PacedEngine):
        up(settings, Console())


if __name__ == "__main__":
    main()
