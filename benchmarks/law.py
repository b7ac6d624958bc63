"""The runs behind a scaling law, as commands: `python benchmarks/law.py --data TOKENS > law.sh; sh law.sh`.

For each width a comparison of one active size: Mamba and MoE-Mamba with more and more experts (the plus recipe, four
experts a token, each half as wide as the model), one long run each with the schedule wsd, cooled down at its end and,
as branches, earlier: three points of the law for little more than the price of one. Rates fall with the width, and are
halved for experts (docs/results.md). The last command fits the law and says its error on models that it has not seen.
"""

import argparse
import shlex

from moemamba import count_parameters, preset

TOP_K = 4
CONTEXT = 256


def dense(width: int) -> str:
    """Mamba of a width, with a layer more for every 16 channels from 64 on, up to 16."""
    return f"mamba-25m-plus,d_model={width},n_blocks={2 * blocks(width)}"


def blocks(width: int) -> int:
    """Pairs of layers."""
    return max(2, min(8, width // 32))


def active(width: int) -> int:
    """Active parameters of that Mamba, which the others have too."""
    return count_parameters(preset("mamba-25m-plus", d_model=width, n_blocks=2 * blocks(width))).active


def contenders(width: int, experts: list[int], steps: list[int], rate: float) -> list[str]:
    """The models of a width, the dense one first, and their branches."""
    own = rate * 128 / width
    found = [f"d{width}-e1={dense(width)},learning_rate={own:.4g}"]
    for each in experts:
        shape = f"d_model={width},n_blocks={blocks(width)},n_experts={TOP_K * each},active={active(width)}"
        found.append(f"d{width}-e{each}=moe-mamba-25m-plus,{shape},learning_rate={own / 2:.4g}")
    trunks = [text.partition("=")[0] for text in found]
    return found + [f"{name}-{short}=@{name},steps={short}" for name in trunks for short in steps[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared tokens, or what --data of moemamba train takes")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8, 32], help="for each that a token visits")
    parser.add_argument("--tokens", type=float, nargs="+", default=[60e6, 120e6, 240e6])
    parser.add_argument("--batch-size", type=int, default=128, help=f"sequences of {CONTEXT} tokens")
    parser.add_argument("--rate", type=float, default=8e-3, help="of Mamba at width 128")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--out", default="runs/law")
    parser.add_argument("more", nargs="*", help="further options of moemamba compare, behind --")
    options = parser.parse_args()
    steps = sorted(round(tokens / (options.batch_size * CONTEXT)) for tokens in options.tokens)
    places = [f"{options.out}/d{width}" for width in options.widths]
    recipe = f"--schedule wsd --cooldown 0.2 --warmup 0.02 --batch-size {options.batch_size} --context {CONTEXT}"
    budget = f"--steps {steps[-1]} --seeds 1 --jobs {options.jobs} --eval-every {max(1, steps[0] // 4)} --compile"
    for width, place in zip(options.widths, places, strict=True):
        models = shlex.join(contenders(width, options.experts, steps, options.rate))
        rest = shlex.join(["--data", options.data, "--out", place, *options.more])
        print(f"moemamba compare {models} {recipe} {budget} {rest}")
    print(f"moemamba plan --fit {shlex.join(places)} --law {options.out}/law.json")


if __name__ == "__main__":
    main()
