"""`moemamba --completion bash|zsh|fish`: what makes a shell complete commands, options and presets with the Tab key.

eval "$(moemamba --completion bash)"                                # in ~/.bashrc
eval "$(moemamba --completion zsh)"                                 # in ~/.zshrc, after compinit
moemamba --completion fish > ~/.config/fish/completions/moemamba.fish
"""

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from importlib import import_module

from ..presets import presets
from .terminal import NAMES

USAGE = 21  # characters of a command's line in which its usage stands

BASH = """\
_moemamba() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands} --help --version --completion"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    [ "$COMP_CWORD" -eq 1 ] || [ "${{current#-}}" != "$current" ] || COMPREPLY+=($(compgen -f -- "$current"))
}}
complete -o filenames -F _moemamba moemamba"""


def script(shell: str, commands: Mapping[str, str]) -> str:
    """The completion of a shell, for commands and what each does; raises ValueError for a shell that is not known."""
    words = {name: [*_options(name), "--help"] for name in commands}
    match shell:
        case "bash" | "zsh":
            cases = "\n".join(
                f'            {name}) words="{" ".join(words[name] + _presets(summary))}" ;;'
                for name, summary in commands.items()
            )
            text = BASH.format(commands=" ".join(commands), cases=cases)
            return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text
        case "fish":
            return "\n".join(_fish(words, commands))
    raise ValueError(f"there is no completion for {shell or 'no shell'!r}; choose one of bash, zsh, fish")


def _presets(summary: str) -> list[str]:
    """All of them where a command's first word may be one, as its usage says."""
    return presets() if {"PRESET", "MODEL"} & set(re.split(r"\W", summary[:USAGE])) else []


def _fish(words: dict[str, list[str]], commands: Mapping[str, str]) -> list[str]:
    lines = ["complete -c moemamba -n __fish_use_subcommand -f"]
    for name, summary in commands.items():
        about = summary[USAGE:].replace("'", "")
        lines.append(f"complete -c moemamba -n __fish_use_subcommand -a {name} -d '{about}'")
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c moemamba {seen} -l {word[2:]}" for word in words[name]]
        if found := _presets(summary):
            lines.append(f"complete -c moemamba {seen} -a '{' '.join(found)}'")
    return lines


def _options(name: str) -> list[str]:
    """Names of a command's options, from itself."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        import_module(f".{name}", __package__).main([NAMES])
    return said.getvalue().split()
