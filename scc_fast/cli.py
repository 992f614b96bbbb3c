"""The command line: scc-fast demo, defend, evaluate, report, bench and doctor."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scc_fast import _options as options
from scc_fast.defenses import DEFENSES, PLANNED
from scc_fast.engine.choose import ENGINES, PRECISIONS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Test-time defense of CLIP-style models against adversarial images.",
)
out, err = Console(), Console(stderr=True)

Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.", metavar="FILE")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Method = Annotated[str, options.one_of("The defense.", DEFENSES)]
Planned = Annotated[str, options.one_of("The defense.", PLANNED)]  # methods with a plan of passes
Precision = Annotated[str, options.one_of("Precision of the encoder.", ("auto", *PRECISIONS))]
Device = Annotated[str | None, options.one_of("Default: CUDA if available.", ("cpu", "cuda"))]


@app.command()
def demo(
    n: Annotated[int, typer.Option(help="Test pictures.", min=1)] = 48,
    adaptive_n: Annotated[
        int, typer.Option(help="Pictures under the adaptive attack.", min=1)
    ] = 12,
    figure: Annotated[Path, typer.Option(help="Figure to write.")] = Path("scc_fast_demo.png"),
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Attack the bundled model, defend it, print one table and draw one figure."""
    from scc_fast._files import write_json
    from scc_fast.evaluate.demo import Demo
    from scc_fast.evaluate.results import tables, timed_rows

    options.figure_format(figure)
    show = Demo(n=n, adaptive_n=min(n, adaptive_n), seed=seed)
    with _progress() as bar:
        task = bar.add_task("attacking and defending", total=None)
        rows, times = show.run(
            lambda total: bar.update(task, total=total + 1), lambda: bar.advance(task)
        )
        show.figure(figure)
        bar.advance(task)
    for drawn in tables(rows, f"bundled model, test split, seed {seed}", times):
        out.print(drawn)
    out.print(
        "PGD does not know the defense; view-aware and BPDA attacks do: rely on their columns."
    )
    out.print(f"figure: {figure}", markup=False)
    if json is not None:
        write_json(json, {"rows": timed_rows(rows, times)})


@app.command()
def defend(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.", metavar="PICTURE…")],
    labels: Annotated[str | None, typer.Option(help='Classes: "a dog,a wolf", or @FILE.')] = None,
    model: Annotated[
        str, typer.Option(help='"tiny", an open_clip name, local-dir:… or package.module:factory')
    ] = "tiny",
    pretrained: Annotated[str | None, typer.Option(help="open_clip tag or weights file.")] = None,
    method: Method = "scc",
    epsilon: Annotated[str | None, typer.Option(help="Budget: 4/255 or 0.0157.")] = None,
    top: Annotated[int, typer.Option(help="Labels to print.", min=1)] = 3,
    output: Annotated[Path, typer.Option(help="Folder for the repaired pictures.")] = Path("."),
    figure: Annotated[Path | None, typer.Option(help="Comparison figure to write.")] = None,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Classify pictures before and after the repair, and write the repaired pictures."""
    from scc_fast.evaluate.pictures import defend_files

    if figure is not None:
        options.figure_format(figure)
    classes = options.classes(labels, model)
    config = options.config(method, DEFENSES[method].Config, epsilon)
    with _progress() as bar:
        task = bar.add_task("defending", total=len(pictures))
        defended = defend_files(
            pictures,
            model=model,
            pretrained=pretrained,
            classes=classes,
            method=method,
            config=config,
            top=top,
            output=output,
            figure=figure,
            seed=seed,
            json=json,
            report=out.print,
            warn=lambda text: err.print(text, style="red", markup=False, soft_wrap=True),
            tick=lambda: bar.advance(task),
        )
    if defended.failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help='"tiny", NAME@TAG (+FILE.pth.tar), hf-hub:…, local-dir:… or package.module:factory'
        ),
    ] = "tiny",
    dataset: Annotated[str, typer.Option(help="As clip-benchmark spells it; or emoji.")] = "emoji",
    defense: Annotated[str, typer.Option(help="Such as none,ttc:steps=5,scc.")] = "none,ttc,scc",
    attack: Annotated[
        str,
        typer.Option(
            help="Such as pgd10,aa,adaptive; standard is damaged,pgd10,pgd-own10,pgd-random10,"
            "adaptive."
        ),
    ] = "standard",
    eps: Annotated[str, typer.Option(help="Budgets, such as 1/255,4/255.")] = "1/255",
    n_samples: Annotated[int | None, typer.Option(help="Default: all.", min=1)] = None,
    adaptive_n: Annotated[
        int | None, typer.Option(help="Pictures under adaptive attacks.", min=1)
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Output folder; the same command resumes in it.")
    ] = Path("scc_fast_results"),
    protocol: Annotated[str, typer.Option(help="ttc or open_clip.")] = "ttc",
    dataset_root: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: the paper's.")] = None,
    download: Annotated[bool, typer.Option(help="Let torchvision download missing files.")] = False,
    seeds: Annotated[str, typer.Option(help="Of the noise, such as 0,1,2.")] = "0",
    batch: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 50,
    precision: Precision = "auto",
    engine: Annotated[
        str, typer.Option(help="local, or ray: many GPUs and machines.", metavar="ENGINE")
    ] = "local",
    workers: Annotated[int | None, typer.Option(help="With ray: actors.", min=1)] = None,
    cores: Annotated[int, typer.Option(help="With ray: cores of an actor.", min=1)] = 1,
    gpus: Annotated[float, typer.Option(help="With ray: GPUs of an actor.", min=0.0)] = 0.0,
    ray_address: Annotated[str | None, typer.Option(help="With ray: of a cluster.")] = None,
    device: Device = None,
    allow_weak_attack: Annotated[
        bool, typer.Option(help="Continue if an attack does not break the undefended model.")
    ] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Measure robust accuracy of defenses under attacks, into a folder for `report`."""
    from scc_fast._files import write_json
    from scc_fast.evaluate import command
    from scc_fast.evaluate.results import tables, timed_rows

    options.engine_suits(
        engine, workers is not None or cores != 1 or gpus != 0 or ray_address is not None
    )
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"--out must be a folder, {folder} is a file")
    options.device_is_there(device)
    try:
        asked = command.Asked(
            command.listed("--defense", defense),
            command.listed("--attack", attack),
            command.budgets(eps),
            adaptive_n,
            allow_weak_attack,
        )
        numbers = command.seeds_of(seeds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    settings = [
        command.Setting(
            model=model,
            dataset=dataset,
            split=split,
            protocol=protocol,
            root=dataset_root,
            download=download,
            n_samples=n_samples,
            seed=seed,
            batch=batch,
            precision=precision,
            device=device,
        )
        for seed in numbers
    ]
    cluster = command.Cluster(workers, cores, gpus, ray_address) if engine == "ray" else None
    with _progress() as bar:
        task = bar.add_task("loading", total=None)

        def start(name: str, total: int, done: int) -> None:
            bar.reset(task, description=name, total=total, completed=done)

        def tick(what: str) -> None:
            bar.update(task, description=what, advance=1)

        def say(text: str) -> None:
            err.print(f"scc-fast: {text}", markup=False)

        outcomes = command.run_all(
            settings, asked, folder, cluster, start=start, tick=tick, say=say
        )
    for outcome in outcomes:
        for drawn in tables(outcome.rows, outcome.folder.name, outcome.times):
            out.print(drawn)
    if json is not None:
        write_json(json, {"rows": [r for o in outcomes for r in timed_rows(o.rows, o.times)]})
    text = f"results: {folder}; tables and figures: scc-fast report {folder}"
    out.print(text, markup=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of evaluate.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report; default: FOLDER/report.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Tables in the papers' layout, figures and one page from the results below FOLDER."""
    from scc_fast.evaluate.report import make_report

    for path in make_report(folder, output):
        out.print(str(path), markup=False)


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help='"tiny", an open_clip name, local-dir:… or package.module:factory')
    ] = "tiny",
    pretrained: Annotated[str | None, typer.Option(help="open_clip tag or weights file.")] = None,
    method: Planned = "scc",
    batch: Annotated[
        str | None, typer.Option(help="Sizes; default 1,8 on a CPU, 1,8,64 on CUDA.")
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(help="Random classes; default 1000, or tiny's own.", min=2),
    ] = None,
    precision: Precision = "auto",
    engine: Annotated[str, options.one_of("Engine of the encoder.", ENGINES)] = "auto",
    device: Device = None,
    seconds: Annotated[
        float, typer.Option(help="Seconds of rounds per batch size.", min=0.01, max=3600)
    ] = 3.0,
    reference: Annotated[bool, typer.Option(help="Also measure the eager reference.")] = True,
    figure: Annotated[
        Path, typer.Option(help="Writes STEM-latency.png, STEM-waterfall.png.", metavar="STEM")
    ] = Path("scc_fast_bench"),
    fresh: Annotated[bool, typer.Option(help="Ignore the rows in FILE.")] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Time a defense of your model beside the reference and its floor; resumes from --json FILE."""
    from scc_fast.bench import figures, tables
    from scc_fast.bench.rows import warnings
    from scc_fast.bench.run import Bench, Options

    if method == "none":
        raise typer.BadParameter('--method none is the row "undefended" of every other method')
    if figure.suffix.lower() in (".png", ".pdf", ".svg") or not figure.name:
        raise typer.BadParameter(
            f"--figure must be a stem for two files, such as out/bench; got {figure}"
        )
    if json is not None and json.is_dir():
        raise typer.BadParameter(f"--json must be a file, {json} is a folder")
    options.device_is_there(device)
    asked = Options(
        model=model,
        pretrained=pretrained,
        method=method,
        batches=None if batch is None else options.batches(batch),
        classes=classes,
        precision=precision,
        engine=engine,
        device=device,
        seconds=seconds,
        reference=reference,
        json=json,
        fresh=fresh,
    )
    with _progress() as bar:
        task = bar.add_task("preparing", total=None)
        measured = Bench(asked)
        bar.update(task, description="measuring", total=measured.ticks)
        rows, waterfall = measured.run(lambda done: bar.advance(task, done))
    ours = rows[-1]
    title = f"{ours['model']} on {ours['device']}: {ours['shape'].split(', ', 1)[-1]}"
    out.print(tables.terminal(rows, title))
    out.print(tables.SHORT_LEGEND.format(baseline=measured.baseline), markup=False)
    for line in warnings(rows):
        out.print(line, style="red", markup=False)
    for path in figures.draw(figure, rows, waterfall, method):
        out.print(f"figure: {path}", markup=False)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="As bench takes it: also show its preprocessing and engine."),
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip tag or weights file.")] = None,
    plan: Annotated[
        str | None,
        options.one_of("Also show the passes of a method and their floor here.", PLANNED),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images that the plan is for.", min=1)] = 1,
    precision: Precision = "auto",
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Show versions, what was built, and which backend serves each op, with reasons."""
    from scc_fast import doctor as examination
    from scc_fast._files import write_json

    if plan is None and (batch != 1 or precision != "auto"):
        raise typer.BadParameter("--batch and --precision need --plan, such as --plan scc")
    if model is None and pretrained is not None:
        raise typer.BadParameter("--pretrained needs --model")
    found = examination.report()
    if model is not None or plan is not None:
        from scc_fast.models import load_model

        loaded = load_model(model or "tiny", pretrained)
        found["model"] = {**loaded.info(), "encoder": examination.encoder(loaded)}
    if plan is not None:
        from scc_fast.bench.machine import Machine

        found["plan"] = examination.plan(loaded, plan, batch, precision, Machine)
    examination.show(out, found)
    if json is not None:
        write_json(json, found)


@contextmanager
def _progress() -> Iterator[Progress]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        yield bar


class _Printed(logging.Handler):
    """Prints the library's log records."""

    def emit(self, record: logging.LogRecord) -> None:
        out.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _log_printed() -> Iterator[None]:
    log, handler = logging.getLogger("scc_fast"), _Printed()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # the root logger may have a handler
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit status 0: done, 1: failed, 2: wrong usage."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with _log_printed():
            app(arguments, prog_name="scc-fast")
    except Exception as error:
        if "--debug" in arguments:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        err.print(f"scc-fast: {text}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
