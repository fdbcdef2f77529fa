"""`trl-apex serve-rewards`."""

import argparse


def run(arguments: list[str]) -> None:
    """Serve reward functions until interrupted."""
    parser = argparse.ArgumentParser(
        prog="trl-apex serve-rewards",
        description="Serves reward functions over HTTP. The token is read from a file or from TRL_APEX_REWARD_TOKEN, "
        "never from the command line, where other users could see it.",
    )
    parser.add_argument(
        *("--reward", "-r"),
        action="append",
        required=True,
        metavar="REWARD",
        help="a name (ocr, pickscore, ...), a call such as 'deqa(model=\"path\")', or module:attribute; may be repeated",
    )
    parser.add_argument("--host", default="127.0.0.1", help="other than loopback needs a token; default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--token-file", help="a file that holds the bearer token")
    given = parser.parse_args(arguments)

    from ..rewards.server import serve
    from .rewards_by_name import load_rewards

    serve(load_rewards(given.reward), host=given.host, port=given.port, token_file=given.token_file)
