"""schemathesis: whatever fits /openapi.json is answered as it says, and never by a 5xx."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
COVERAGE_TIMEOUT_S = 400
FUZZING_S = 120
FUZZING_TIMEOUT_S = 180  # what was begun is finished and shrunk


def tested(timeout_s: float, *options: str) -> str:
    """Runs some phases to their end; says how many requests that took."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "run"]
    command += [f"{os.environ['EXPERTLINE_URL']}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--seed", "1", "--request-timeout", "60", "--continue-on-failure"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "hooks"}
    done = subprocess.run(
        [*command, "--no-color", "--warnings", "off", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    failures = done.stdout.partition("= FAILURES =")[2] or done.stdout + done.stderr
    assert done.returncode == 0, failures
    return next(line for line in done.stdout.splitlines() if " generated, " in line).strip()


if __name__ == "__main__":
    # Apart: of a common budget the first would get a share, and be cut where it is spent.
    covered = tested(COVERAGE_TIMEOUT_S, "--phases", "examples,coverage")
    fuzzed = tested(FUZZING_TIMEOUT_S, "--phases", "fuzzing", "--max-time", str(FUZZING_S))
    print(f"coverage: {covered}; fuzzing: {fuzzed}")
