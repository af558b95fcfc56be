"""The command line."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from ampcheck.loops.launch import module_exists
from ampcheck.rules import RULES
from ampcheck.rules.rule import Rule

app = typer.Typer(
    help="Is PyTorch mixed precision really on and sound, and if training died of it, where and why?",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
    options_metavar="[OPTIONS]",
)
def run(
    target: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]...", help="The script and its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as with `python -m`.")] = False,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report to FILE as JSON.")] = None,
    watch_steps: Annotated[int, typer.Option(help="How many training steps to watch.")] = 1,
    fail_on: Annotated[
        str, typer.Option(metavar="error|warning|never", help="Stop with status 3 on a finding this severe or worse.")
    ] = "never",
    select: Annotated[str, typer.Option(metavar="CODES", help="Judge only these rules: AMP101,AMP2,...")] = "",
    ignore: Annotated[str, typer.Option(metavar="CODES", help="Do not judge these rules.")] = "",
    no_exports: Annotated[
        bool, typer.Option("--no-exports", help="Leave exports alone instead of comparing them.")
    ] = False,
    numerics: Annotated[
        str,
        typer.Option(
            metavar="off|free|guard|stop",
            help="Look for losses and gradients that are not finite: at every step (guard), and stop there (stop).",
        ),
    ] = "guard",
) -> int:
    """Run a training script, unmodified, under the checker."""
    from ampcheck.loops.script import run as run_under_checker

    script, *args = target
    if not module and not Path(script).is_file():
        raise typer.BadParameter(f"there is no script {script!r}")
    if module and not module_exists(script):
        raise typer.BadParameter(f"there is no module {script!r}")
    if json is not None:
        _require_writable(json)
    try:
        return run_under_checker(
            script,
            args,
            module=module,
            select=select,
            ignore=ignore,
            fail_on=fail_on,
            watch_steps=watch_steps,
            report=json or False,
            exports=not no_exports,
            numerics=numerics,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def rules() -> None:
    """List the rules."""
    table = Table("code", "name", "severity", "what it says", box=None, header_style="bold")
    for rule in RULES:
        table.add_row(rule.code, rule.name, str(rule.severity), rule.summary)
    _console().print(table)


@app.command()
def explain(code: Annotated[str, typer.Argument(help="A rule's code or name.")]) -> None:
    """Show a rule's documentation."""
    rule = next((rule for rule in RULES if code.upper() == rule.code or code.lower() == rule.name), None)
    if rule is None:
        raise typer.BadParameter(f"there is no rule {code!r}; `ampcheck rules` lists them")
    _console().print(Markdown(page(rule)))


@app.command()
def compare(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="FACTORY",
            help="`package.module:function`, which returns (model, inputs), or (model, inputs, options) with a mapping "
            "of more options for `ampcheck.compare`.",
        ),
    ],
    exported: Annotated[str, typer.Argument(metavar="EXPORTED", help="The exported model: a .pt, .pt2 or .onnx file.")],
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report to FILE as JSON.")] = None,
    figure: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the error of every module, as PNG and SVG.")
    ] = None,
    fail_on: Annotated[
        str, typer.Option(metavar="error|warning|never", help="Exit with status 3 on a finding this severe or worse.")
    ] = "never",
    select: Annotated[str, typer.Option(metavar="CODES", help="Judge only these rules: AMP601,AMP602,...")] = "",
    ignore: Annotated[str, typer.Option(metavar="CODES", help="Do not judge these rules.")] = "",
    trusted: Annotated[bool, typer.Option("--trusted", help="Let EXPORTED run code, as a .pt2 file can.")] = False,
) -> int:
    """Compare an exported model with the eager one, and find where they differ."""
    from ampcheck.export import compare as compare_export
    from ampcheck.export import draw_errors
    from ampcheck.rules.judging import reaching, threshold

    for path in filter(None, (json, figure)):
        _require_writable(path)
    try:
        limit = threshold(fail_on)
        model, inputs, options = _made(factory)
        report = compare_export(model, exported, inputs, select=select, ignore=ignore, trusted=trusted, **options)
        _console(soft_wrap=True, highlight=False).print(report.rendered())
        if json is not None:
            report.write(json)
        if figure is not None and report.comparison is not None:
            draw_errors(report.comparison, figure)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    return 3 if reaching(report.findings, limit) else 0


@app.command()
def doctor() -> None:
    """Show what is installed and what the devices here compute natively, for a bug report."""
    from ampcheck.observe.walk import environment

    found = environment()
    table = Table(box=None, show_header=False)
    table.add_row("ampcheck", _version("ampcheck"))
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row("torch", found.torch)
    for (device, dtype), native in sorted(found.native.items()):
        table.add_row(f"{device} {dtype}", "native" if native else "emulated or not supported")
    for host in _hosts():
        table.add_row(host, _version(host))
    _console().print(table)


def _console(**options: Any) -> Console:
    """A console on standard output that replaces characters its encoding lacks, instead of ending the program."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console(**options)


def page(rule: Rule) -> str:
    """A rule's documentation page as Markdown."""
    sections = re.sub(r"(?m)^(?=\S)(.+)\n(?=    )", r"### \1\n\n", rule.page)
    body = re.sub(r"(?m)^    ", "", sections)
    return f"## {rule.code} {rule.name}\n\n*{rule.severity}*\n\n{body}\n\n### Fix\n\n{rule.fix}\n"


def main() -> None:
    """Run the command line: invalid input exits with status 2 and one line on standard error."""
    try:
        # Calling the app itself would put its own `sys.excepthook` in the script's way.
        status: Any = typer.main.get_command(app)(standalone_mode=False)
    except typer.Abort:
        status = 130
    except Exception as error:
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        sys.stderr.write(f"ampcheck: {show()}\n")
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _made(factory: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model, the inputs and the options that ``package.module:function`` returns.

    Also looks for modules in the working directory. Raises ``ValueError``.
    """
    from ampcheck.export import compare as compare_export

    module, _, name = factory.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), name)()
        model, inputs, *more = made
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise ValueError(
            f"the factory {factory!r} does not return a model and its inputs: {type(error).__name__}: {lines[0]}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not hasattr(model, "named_modules"):
        raise ValueError(f"the factory {factory!r} returns a {type(model).__name__} instead of a model")
    if len(more) > 1 or not all(isinstance(given, Mapping) for given in more):
        raise ValueError(
            f"the factory {factory!r} returns more than a model, its inputs and one mapping of options: "
            f"{', '.join(type(given).__name__ for given in made)}"
        )
    options = {str(key): value for given in more for key, value in given.items()}
    taken = inspect.signature(compare_export).parameters.values()
    known = {option.name for option in taken if option.kind is option.KEYWORD_ONLY}
    unknown = sorted(set(options) - (known - set(inspect.signature(compare).parameters)))
    if unknown:
        raise ValueError(f"the factory {factory!r} gives an unknown option: {', '.join(unknown)}")
    return model, inputs, options


def _hosts() -> list[str]:
    """The distributions that AmpCheck's extras name."""
    names = set()
    for requirement in importlib.metadata.requires("ampcheck") or ():
        match = re.match(r"([\w.-]+)[^;]*;.*extra == [\"'](?!all|bench|dev|export|test)([\w-]+)[\"']", requirement)
        if match:
            names.add(match[1])
    return sorted(names)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _require_writable(path: str) -> None:
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        if not os.access(target, os.W_OK):
            raise typer.BadParameter(f"the report cannot be written to {path!r}")
        return
    parent = target.absolute().parent
    if target.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise typer.BadParameter(f"the report cannot be written to {path!r}")
