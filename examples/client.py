"""Ask a server that examples/serve.sh started; the answer is written as it comes.

python examples/client.py --prompt "Why is the sky blue?" [--url http://localhost:8000]
"""

import argparse
import json
from collections.abc import Iterator
from urllib.request import Request, urlopen


def ask(url: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """Yield the pieces of a completion of the first model that the server has."""
    with urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    request = Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request) as events:
        for line in events:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]


def main() -> None:
    """Print an answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    for piece in ask(args.url, args.prompt, args.max_tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
