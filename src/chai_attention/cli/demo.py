"""``chai demo``: calibrate a small model, generate with and without clusters, measure the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chai_attention.cli import options
from chai_attention.cli.output import Output
from chai_attention.cli.progress import import_libraries, progress_bar
from chai_attention.cli.records import demo_record, profile_record
from chai_attention.cli.tables import demo_tables, profile_table, summary_line
from chai_attention.errors import ProfileError
from chai_attention.reports.plots import PROFILE_PLOTS, profile_plots


def demo_command(
    command: typer.Context,
    model: options.ModelOption = "smollm2-135m",
    text: Annotated[
        str | None,
        typer.Option(
            help="Text file or .jsonl: half calibrates, half measures.",
            show_default="the language reference that Python carries",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="What both generations answer, about a passage of the text.")
    ] = ("Say in a few sentences what the text above is about."),
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=2)] = 96,
    save: Annotated[
        str, typer.Option(help="K,V bytes of 1,024 tokens to save; the loss is measured.")
    ] = "28%",
    out: Annotated[
        Path,
        options.output("Folder for the profile and the plots.", "profile.json", *PROFILE_PLOTS),
    ] = Path("demo-output"),
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Calibrate a model, then generate with and without clustered heads side by side."""
    import_libraries(quiet=quiet)
    from chai_attention.calibration import load_texts
    from chai_attention.calibration.texts import check_source
    from chai_attention.evaluation.demo import built_in_text, run_demo
    from chai_attention.integrations.transformers.loading import load_model
    from chai_attention.runtime.shape import describe

    options.keep_inputs([out / "profile.json"], [model, text])
    if text is not None:
        check_source(text)
    source = "the Python language reference" if text is None else Path(text).name
    options.make_folder(command, out, ProfileError)
    with progress_bar(f"loading {model}", quiet=quiet) as bar:
        loaded, tokenizer = load_model(model, dtype, device, trust_remote_code=trust_remote_code)
        if text is None:
            texts = built_in_text()
        else:
            texts = load_texts(text, tokens=100_000, tokenizer=tokenizer)
        result = run_demo(
            loaded,
            tokenizer,
            texts,
            prompt,
            source=source,
            max_new_tokens=max_new_tokens,
            save=options.share("--save", save),
            progress=bar.tell,
        )
    shape = describe(loaded)
    result.profile.save(out / "profile.json")
    shown = Output(as_json, quiet)
    shown.give(lambda: demo_record(result, profile_record(result.profile, shape)))
    shown.say(profile_table(result.profile, shape))
    shown.say(summary_line(result.profile, shape, loaded.dtype.itemsize))
    shown.say("")
    shown.say(demo_tables(result, prompt))
    shown.say(f"\nprofile written to {out / 'profile.json'}")
    for path in profile_plots(result.profile, out):
        shown.say(f"plot written to {path}")
