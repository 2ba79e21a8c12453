"""Tools for adapter files: `python -m lora_sd <verb>`; alone it lists the verbs."""

import importlib
import signal
from collections.abc import Sequence

from lora_sd.errors import ConfigError, run_program, shown_list
from lora_sd.verbs import SUMMARIES
from lora_sd.verbs.arguments import Parser, nearest

PROGRAM = "python -m lora_sd"


def main(argv: Sequence[str]) -> int:
    """Run one verb; the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    verb, *rest = argv
    if verb not in SUMMARIES:
        hint = nearest(verb, SUMMARIES) or f" The verbs are {shown_list(list(SUMMARIES), 99)}."
        raise ConfigError(f"There is no verb '{verb}'.{hint}")
    module = importlib.import_module(f"lora_sd.verbs.{verb.replace('-', '_')}")
    parser = Parser(f"{PROGRAM} {verb}", module.DESCRIPTION, module.EXAMPLE)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(rest)))


def overview() -> str:
    """The verbs, a line each."""
    width = max(map(len, SUMMARIES))
    lines = [f"  {verb:{width}}  {summary}" for verb, summary in SUMMARIES.items()]
    return "\n".join(
        [
            "Tools for Stable Diffusion adapter files.",
            "",
            f"usage: {PROGRAM} VERB ...",
            "",
            *lines,
            "",
            f"`{PROGRAM} VERB --help` explains a verb and shows an example.",
        ]
    )


def stop(number: int, _: object) -> None:
    """SIGTERM, taken as Ctrl-C is: what was half written is removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    run_program(main)
