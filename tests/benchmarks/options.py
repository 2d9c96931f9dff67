"""The command line of a benchmark, whose docstring explains the options."""

import argparse


def parse(doc, **defaults):
    """Read options with these defaults: numbers, texts, lists of either, and False for flags."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=plain)
    for name, value in defaults.items():
        kind = {"type": type(value)}
        if isinstance(value, bool):
            kind = {"action": "store_true"}
        elif isinstance(value, list):
            kind = {"type": type(value[0]), "nargs": "+"} if value else {"nargs": "*"}
        parser.add_argument(f"--{name}", default=value, **kind)
    return parser.parse_args()
