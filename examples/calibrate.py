"""Calibrate on your own data: the smallest K,V cache that keeps to a loss you choose.

python examples/calibrate.py --text chats.jsonl --out profile.json [--model MODEL]

Text is a file (.txt, or .jsonl, .json, .csv, .tsv, .parquet with texts or chats). Take what your
users write, at about the length they use: the promise holds for text of that kind.
"""

import argparse

from chai_attention import calibrate
from chai_attention.calibration import load_texts
from chai_attention.integrations.transformers.loading import load_model


def main() -> None:
    """Calibrate, say what was measured, write the profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a folder or a name on the hub")
    parser.add_argument("--text", required=True, help="a file of sample text")
    parser.add_argument("--out", default="profile.json")
    parser.add_argument("--max-loss", type=float, default=0.01, help="0.01: perplexity 1%% higher")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--samples", type=int, default=64, help="windows to learn from")
    parser.add_argument("--held-out", type=int, default=64, help="windows to measure on")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    windows = args.samples + args.held_out
    texts = load_texts(
        args.text, tokens=windows * args.length, tokenizer=tokenizer, length=args.length
    )
    profile = calibrate(
        model,
        tokenizer,
        texts,
        max_loss=args.max_loss,
        length=args.length,
        samples=args.samples,
        held_out=args.held_out,
        source=args.text,
    )
    print(f"K heads that far keys keep, per layer: {profile.clusters}")
    promise = profile.promise or {}
    print(f"K,V bytes saved: {promise['saved']:.1%}")
    print(f"perplexity on text kept back: {promise['rise']:+.2%} ±{promise['standard_error']:.2%}")
    profile.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
