"""How fast the page draws: `page.py [--tokens 2000] [--layers 8] [--experts 8]`.

A server of a model of random weights, and its page in a browser (Chromium, with playwright): the routing of a text is
read, and from its arrival on it is decoded, laid out and drawn, first as the reader sees it, where only what is in view
is drawn, then the whole map at once on one canvas, which the page never does. The clock is the browser's, until its
next frame. The last line is one JSON object.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from moemamba import ModelConfig, MoEMamba
from moemamba.config import ExpertsConfig
from moemamba.text import ByteTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "tools"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TURNS = 7

# In the page: the modules that it has loaded itself, on elements of its own.
MEASURE = """async ([text, whole]) => {
    const { Score } = await import("/page/score.js");
    const asked = { method: "POST", body: JSON.stringify({ prompt: text }) };
    const answer = await (await fetch("/v1/routing", asked)).json();
    answer.numbers = answer.layers.map((_, i) => `${i}`);
    const box = document.getElementById("score");
    const score = new Score(box);
    const frame = () => new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
    await frame();
    const began = performance.now();
    score.set(answer);
    if (whole) {
        const pen = document.createElement("canvas").getContext("2d");
        pen.canvas.width = score.width;
        pen.canvas.height = score.first.length * score.line;
        score.paint(pen, 0, score.first.length);
        pen.getImageData(0, 0, 1, 1);  // waits until it is drawn
    }
    const busy = performance.now() - began;
    await frame();
    return [busy, performance.now() - began, score.tokens, score.layers];
}"""


def build(layers: int, experts: int) -> MoEMamba:
    torch.manual_seed(0)
    config = ModelConfig("ME", layers, 32, vocab_size=257, experts=ExpertsConfig(experts, top_k=2))
    return MoEMamba(config).eval().requires_grad_(False)


def measured(asked: argparse.Namespace, playwright: Any) -> dict[str, Any]:
    from servers import running

    draw = random.Random(0)
    text = "".join(draw.choice("etaoin shrdlu") for _ in range(asked.tokens))
    found: dict[str, Any] = {"tokens": asked.tokens, "layers": asked.layers, "top_k": 2}
    with running(build(asked.layers, asked.experts), ByteTokenizer()) as server, playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{server.url}/#routing?text=abc")
        page.wait_for_selector("#found:visible")
        for name, whole in (("in view", False), ("whole", True)):
            turns = [page.evaluate(MEASURE, [text, whole]) for _ in range(TURNS)]
            assert all(turn[2:] == [asked.tokens, asked.layers] for turn in turns)
            busy, shown = (sorted(turn[i] for turn in turns) for i in (0, 1))
            found[name] = {
                "script_ms": round(statistics.median(busy), 1),
                "frame_ms": round(statistics.median(shown), 1),
            }
            print(
                f"{name}: {found[name]['script_ms']} ms of work, shown after {found[name]['frame_ms']} ms", flush=True
            )
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 2000), ("layers", 8), ("experts", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print(json.dumps({"skipped": "needs playwright: pip install playwright"}))
        return
    if BROWSER is None:
        print(json.dumps({"skipped": "needs a browser: apt-get install chromium"}))
        return
    print(json.dumps(measured(asked, sync_playwright)))


if __name__ == "__main__":
    main()
