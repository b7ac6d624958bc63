"""A GGUF file looked at in llama.cpp itself, where the package xllamacpp is installed."""

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...text import Tokenizer

SAMPLE = (
    "The quick brown fox can't jump over 13 lazy dogs, they're too big.\n\n\n\tdef f(x):\n\t\treturn x ** 2  # two\n"
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Zwölf Boxkämpfer jagen Viktor quer über den Deich."
    " いろはにほへと ちりぬるを。敏捷的棕色狐狸跳过懒狗。 نص حكيم له سر قاطع وذو شأن عظيم."
    " 👩‍👩‍👧‍👦🇩🇪✨ a  b   c     d        e"
    "                        f <|endoftext|> <s></s> <|im_end|> [SEP]\r\n  x = 0x1F; y += 1.5e-3;"
)

LIMIT = 300
"""seconds for a file to be opened and a text to be split"""


class Runner:
    """A model in llama.cpp, keys and values in float32 as everything else.

    Raises:
        ImportError: xllamacpp is not installed.
    """

    def __init__(self, file: Path, context: int = 512):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.cpuparams.n_threads = context, 1
        parameters.warmup, parameters.n_parallel, parameters.verbosity = False, 1, -1
        single = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cache_type_k = parameters.cache_type_v = single
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; names of special tokens in it are text."""
        asked = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", asked, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return [int(each) for each in json.load(answer)["tokens"]]

    def complete(self, prompt: Sequence[int], tokens: int, likeliest: int = 5) -> list[dict[str, Any]]:
        """The likeliest token at each step: {"id", "top_logprobs": [{"id", "logprob"}, ...]}."""
        asked = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "n_probs": likeliest,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        choice: dict[str, Any] = self._server.handle_completions(asked)["choices"][0]
        return list(choice["logprobs"]["content"])


def compare(file: Path, own: "Tokenizer", text: str = SAMPLE) -> bool | None:
    """Whether llama.cpp splits a text as the tokenizer does; None where xllamacpp is not installed.

    Raises:
        ValueError: it does not, with the first token that differs, or it cannot read the file.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    (found,), expected = tokenize(file, [text]), own.encode(text)
    if found == expected:
        return True
    pairs = enumerate(zip(found, expected, strict=False))
    place = next((number for number, (a, b) in pairs if a != b), min(len(found), len(expected)))
    begins = own.decode(expected[place:][:8])
    raise ValueError(f"llama.cpp splits text otherwise than the tokenizer of this model, from {begins!r} on")


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids that llama.cpp makes of texts; raises as `compare`."""
    return _asked(file, [["tokenize", text] for text in texts])


def complete(file: Path, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[dict[str, Any]]]:
    """So many greedy tokens behind each prompt, as `Runner.complete`; raises as `compare`."""
    return _asked(file, [["complete", list(prompt), tokens] for prompt in prompts])


def _asked(file: Path, calls: list[Any]) -> Any:
    """What methods of a `Runner` return, in a process of its own.

    llama.cpp ends its process where it finds a file wrong, and now and then closing a server of xllamacpp 2026.10 never
    comes to an end.
    """
    command = [sys.executable, "-P", __file__, str(file)]  # by itself it begins at once
    ours = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        asked = json.dumps(calls).encode()
        done = subprocess.run(command, input=asked, capture_output=True, env=ours, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"llama.cpp has not opened {file.name} within {LIMIT} seconds") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(f"llama.cpp cannot open {file.name}: {said[-1][:160]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    status = 1
    try:
        runner = Runner(Path(sys.argv[1]))
        answers = [getattr(runner, name)(*arguments) for name, *arguments in json.load(sys.stdin)]
        sys.stdout.write(json.dumps(answers) + "\n")
        status = 0
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        os._exit(status)  # before the server is closed
