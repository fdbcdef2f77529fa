"""`trl-apex push`."""

import argparse


def run(arguments: list[str]) -> None:
    """Upload a run directory, with its model card written anew."""
    given = _parser().parse_args(arguments)

    from ..hub import push_run, refresh_model_card
    from ..hub.upload import files_to_upload
    from ..report import write_figures, write_report

    files_to_upload(given.run_dir)  # says what is missing before anything is written
    try:
        write_report([given.run_dir])
        write_figures(given.run_dir)
    except (ImportError, FileNotFoundError) as error:
        print(f"Without pictures of the run: {error}")
    refresh_model_card(given.run_dir, given.repo_id)
    url = push_run(
        given.run_dir,
        given.repo_id,
        private=given.private,
        revision=given.revision,
        create=not given.no_create,
        commit_message=given.message,
    )
    print(url)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-apex push",
        description="Uploads adapter, aggregator state, model card, samples and report of a run in one commit. The token is "
        "the one of `hf auth login`, or HF_TOKEN.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of a training run")
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="repository; created if it is missing")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="visibility of a new repository")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--no-create", action="store_true", help="fail if the repository does not exist")
    parser.add_argument("--message", default="Upload run", help="commit message; default: %(default)s")
    return parser
