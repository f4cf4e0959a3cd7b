"""`expertline loadtest`: open-loop load from the terminal."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from deploy.errors import StartError, UsageError
from loadtest.runner import LoadError, LoadPlan, run_load
from loadtest.workload import WorkloadError


def run_loadtest(plan: LoadPlan, json_path: Path | None, console: Console) -> None:
    """Runs the plan, prints the report and writes it as JSON where asked.

    Raises:
        UsageError: the server cannot be used so, or the file cannot be written.
        StartError: some request failed or the run cannot be trusted; the report says which.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("requests ended", total=plan.requests)

            def report(sent: int, ended: int, total: int | None) -> None:
                progress.update(task, completed=ended, total=total)

            result = run_load(plan, report)
        if json_path is not None:
            json_path.write_text(result.to_json() + "\n", encoding="utf-8")
    except (LoadError, WorkloadError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"{json_path}: {error.strerror}") from error
    console.print(result.render())
    if not result.flawless:
        raise StartError("the run was not flawless")
