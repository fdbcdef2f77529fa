"""`trl-apex report`."""

import argparse


def run(arguments: list[str]) -> None:
    """Write the HTML report of runs, and PNG figures where matplotlib is installed."""
    parser = argparse.ArgumentParser(
        prog="trl-apex report", description="One self-contained HTML page about a run, or several side by side."
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="the output_dir of a training run")
    parser.add_argument(
        "-o", "--output", help="the page; by default report.html in the run directory, or beside the first of several"
    )
    parser.add_argument("--figures", action="store_true", help="write PNG figures into RUN_DIR/figures as well")
    given = parser.parse_args(arguments)

    from ..report import write_figures, write_report

    print(write_report(given.run_dirs, given.output))
    if given.figures:
        for run_dir in given.run_dirs:
            for path in write_figures(run_dir):
                print(path)
