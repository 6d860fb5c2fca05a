"""``chai generate``: text from a prompt, and what the clusters gained."""

from __future__ import annotations

from typing import Annotated

import typer

from chai_attention.cli import options


def generate_command(
    model: options.Model,
    profile: Annotated[str, typer.Option(help="A profile, or the name of a published schedule.")],
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.", min=1)] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; higher is more varied.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
) -> None:
    """Stream text written by MODEL with clustered heads; then a table of time and memory."""
    import torch

    from chai_attention.cli.tables import generation_table
    from chai_attention.integrations.transformers import enable, saved_weight_bytes
    from chai_attention.integrations.transformers.loading import load_model
    from chai_attention.integrations.transformers.support import describe
    from chai_attention.integrations.transformers.writing import encode_prompt, write
    from chai_attention.profile import ClusterProfile

    chosen = ClusterProfile.resolve(profile)
    loaded, tokenizer = load_model(model, dtype, device)
    chosen.check(describe(loaded))
    enable(loaded, chosen)
    ids = encode_prompt(tokenizer, prompt, chat=chat).to(loaded.device)
    torch.manual_seed(seed)
    written = write(
        loaded,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        on_text=lambda text: typer.echo(text, nl=False),
    )
    typer.echo("\n")
    typer.echo(generation_table({"CHAI": written}))
    if weights := saved_weight_bytes(loaded):
        typer.echo(f"rows of removed heads in W_Q and W_K, not computed: {weights:,} bytes")
