"""The command ``hubrl``; each subcommand's module is imported only when it is called."""

from __future__ import annotations

import importlib
from typing import NoReturn

import click

from hubrl import cli
from hubrl.specs import closest

#: Each is the function ``command`` of the module ``hubrl.<name>``.
COMMANDS = {
    "train": "Train an agent, with a hub or without.",
    "evaluate": "Play whole games with a trained agent.",
    "export": "Make an ONNX graph of an agent, or distil it into one encoder.",
    "pretrain": "Train an encoder on a game and make it a hub member.",
    "study": "Compare variants over games and seeds, with intervals.",
    "hubs": "List, show, fetch, check, rank, extend and share hubs.",
    "bench": "Measure speed against plain Stable-Baselines3.",
}


class LazyGroup(click.Group):
    """Knows its subcommands' names and one-line help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"hubrl.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = closest(args[0], COMMANDS).replace("'", "")  # as one types it
            ctx.fail(f"no such command {args[0]!r}{hint}, commands: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, invoke_without_command=True)
@click.version_option(package_name="hubrl", message="%(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Reinforcement learning that stands on a hub of pretrained encoders."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Entry point of the console command."""
    cli.run(group, "hubrl")


if __name__ == "__main__":
    main()
