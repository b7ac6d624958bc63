"""The page in a real browser: it writes, stops, shows routing, forks states and says what went wrong, all by itself."""

import shutil
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import pytest
from servers import TEMPLATE, running, small

import moemamba
from moemamba.inference import Engine

PAGE = Path(moemamba.__file__).parent / "serving" / "page"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODEL = small()

slow = pytest.mark.slow


def test_the_page_is_small_and_plain():
    files = [file for file in PAGE.iterdir() if file.is_file()]
    assert {file.suffix for file in files} == {".html", ".css", ".js"}
    assert sum(file.stat().st_size for file in files) <= 61_000
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert "<style" not in html and " style=" not in html and " onclick=" not in html, "the policy would refuse them"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    if BROWSER is None:
        pytest.skip("needs a browser (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        # Without a sandbox, since tests may run as root; it loads nothing but our own page.
        made = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def server():
    with running(MODEL, template=TEMPLATE, max_tokens=3000) as made:
        yield made


@contextmanager
def opened(browser, server, hash="", width=1280, **options):
    """The page, which must neither complain in the console nor ask anybody else."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.errors, page.foreign, page.allowed = [], [], ()
    page.on("console", lambda said: page.errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.errors.append(f"{error}"))
    page.on(
        "request", lambda asked: None if asked.url.startswith((server.url, "data:")) else page.foreign.append(asked.url)
    )
    page.goto(f"{server.url}/{hash}")
    page.wait_for_selector("body[data-ready]")
    yield page
    assert not [each for each in page.errors if not each.startswith(page.allowed or "\0")]
    assert not page.foreign
    context.close()


def write(page, text):
    page.fill("#prompt", text)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#go:text-is('Write on')")
    return page.text_content("#story")


@slow
def test_write_and_its_link(browser, server):
    def answer(seed):
        asked = {"prompt": "once ", "max_tokens": 30, "temperature": 0.8, "seed": seed}
        return server.post("/v1/completions", **asked)["choices"][0]

    # One that does not end by itself, and that a text field leaves as it is.
    fits = (
        each for each in range(1000) if (made := answer(each))["finish_reason"] == "length" and "\r" not in made["text"]
    )
    seed = next(fits)
    with opened(browser, server, f"#write?seed={seed}") as page:
        page.fill("[name=max_tokens]", "30")
        text = write(page, "once ")
        assert text == "once " + answer(seed)["text"]
        assert "30 tokens" in page.text_content("#told") and f"seed {seed}" in page.text_content("#told")
        assert page.text_content("#heard").strip(), "it is read out"
        link = page.evaluate("location.hash")
        page.focus("#story")
        page.keyboard.press("Home")
        page.wait_for_selector("#peek tr")
        assert page.locator("#peek tr").count() >= 5 and "%" in page.text_content("#peek p")
        page.keyboard.press("Escape")
        page.click("#go")
        page.wait_for_selector("#go:text-is('Write on')")
        assert page.text_content("#story").startswith(text) and len(page.text_content("#story")) > len(text)
        told = page.text_content("#story")
        page.click("nav a:text-is('States')")
        page.wait_for_selector("#states:visible")
        page.click("nav a:text-is('Write')")
        page.wait_for_timeout(200)
        assert page.text_content("#story") == told and page.text_content("#go") == "Write on", (
            "nothing is written again"
        )
        page.click("#edit")
        assert page.input_value("#prompt").startswith(text)
    with opened(browser, server, f"/{link}"[1:]) as page:
        page.wait_for_selector("#go:text-is('Write on')")
        assert page.text_content("#story") == text, "a link shows the same again"


@slow
def test_links_keep_every_character(browser, server):
    text = "a\r\n\0b\x7f\x1b &?#%+=é\u2028🦔 "
    asked = {"prompt": text, "max_tokens": 8, "temperature": 0}
    made = server.post("/v1/completions", **asked)["choices"][0]["text"]
    values = urlencode({"text": text, "max_tokens": 8, "temperature": 0, "seed": 1, "wrote": 1})
    with opened(browser, server, f"#write?{values}") as page:
        page.wait_for_selector("#go:text-is('Write on')")
        assert page.text_content("#story") == text + made
        hash = page.evaluate("location.hash")
        assert dict(parse_qsl(hash.partition("?")[2], keep_blank_values=True))["text"] == text


@slow
def test_stop(browser, server):
    asked = {"max_tokens": 500, "temperature": 0}  # what goes round in circles by then never ends
    endless = next(
        each
        for each in "abcdefghij"
        if server.post("/v1/completions", prompt=each, **asked)["choices"][0]["finish_reason"] == "length"
    )
    with opened(browser, server, "#write?max_tokens=3000&temperature=0") as page:
        page.fill("#prompt", endless)
        page.click("#go")
        page.wait_for_selector("#story .token:nth-child(5)", state="attached")
        assert page.text_content("#go") == "Stop"
        page.keyboard.press("Escape")
        page.wait_for_selector("#told:has-text('stopped')")
        made = page.text_content("#story")
        page.wait_for_timeout(300)
        assert page.text_content("#story") == made
        assert int(page.text_content("#told").split(" ")[0].replace(",", "")) < 2900
        for _ in range(50):
            if server.ask("GET", "/v1/stats")[1]["slots_in_use"] == 0:
                break
            page.wait_for_timeout(50)
        assert server.ask("GET", "/v1/stats")[1]["slots_in_use"] == 0, "the server stops too"


@slow
def test_chat(browser, server):
    with opened(browser, server, "#write?max_tokens=12") as page:
        page.click("#mode [value=chat]")
        page.fill("#prompt", "hello")
        page.keyboard.press("Enter")
        page.wait_for_selector("#turns .assistant .token")
        page.wait_for_selector("#go:text-is('Send')")
        assert page.locator("#turns li").count() == 2
        assert page.text_content("#turns .user .prose") == "hello" and page.text_content("#turns .assistant .prose")
        page.reload()
        page.wait_for_selector("#turns .assistant")
        assert page.text_content("#turns .user .prose") == "hello"


@slow
def test_answer_again(browser, server):
    with opened(browser, server, "#write?max_tokens=12") as page:
        page.click("#mode [value=chat]")
        assert not page.is_visible("#again")
        for said in ("hello", "more"):
            page.fill("#prompt", said)
            page.keyboard.press("Enter")
            page.wait_for_selector(f"#turns li:nth-child({4 if said == 'more' else 2}) .token")
            page.wait_for_selector("#go:text-is('Send')")
        page.fill("#prompt", "a draft")
        page.evaluate("document.querySelector('#turns li:last-child').dataset.old = 1")
        page.click("#again")
        page.wait_for_selector("#turns li:nth-child(4):not([data-old]) .token")
        page.wait_for_selector("#go:text-is('Send')")
        assert page.locator("#turns li").count() == 4 and page.input_value("#prompt") == "a draft"
        assert page.locator("#turns .user .prose").all_text_contents() == ["hello", "more"]
        page.reload()
        page.wait_for_selector("#turns li:nth-child(4)")
        assert page.locator("#turns li").count() == 4, "the link has what was answered last"


@slow
def test_skip_and_copy(browser, server):
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, server, permissions=permissions) as page:
        assert page.locator("#skip").bounding_box()["x"] < 0
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "skip" and page.locator("#skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main" and page.evaluate("location.hash") == "#write"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main') !== null"), "the head is behind"
        page.click("#copy")
        page.wait_for_selector("#copy:text-is('Copied')")
        assert page.evaluate("navigator.clipboard.readText()") == page.url
        page.wait_for_selector("#copy:text-is('Copy link')")


@slow
def test_routing(browser, server):
    text = "to be or not to be"
    found = server.post("/v1/routing", prompt=text)
    with opened(browser, server, "#routing") as page:
        page.fill("#read-text", text)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#found:visible")
        assert f"{len(text)} tokens through 2 layers" in page.text_content("#read-told")
        assert page.locator("#experts button").count() == sum(found["n_experts"])
        page.focus("#score")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert page.text_content("#token h2") == "o" and page.locator("#token tr").count() == 2
        first = gates(found)
        shown = page.locator("#token .visit").all_text_contents()
        expected = [f"{expert}{100 * gate:.1f}%" for layer in first[1] for expert, gate in layer]
        assert [each.strip() for each in shown] == expected
        page.keyboard.press("Enter")
        expert = first[1][1][0][0]
        assert page.text_content("#expert h2").endswith(f"expert {expert}")
        visits = {text[i] for i, layers in enumerate(first) if expert in dict(layers[1])}
        words = {each.split(" ")[0].replace("·", " ") for each in page.locator("#expert .word").all_text_contents()}
        assert words == visits, "its tokens"
        page.wait_for_selector("#expert dd:nth-of-type(3):has-text('%')")
        page.screenshot()
        link = page.evaluate("location.hash")
        assert "layer=1" in link and f"expert={expert}" in link and "token=1" in link
    with opened(browser, server, link, width=400) as page:
        page.wait_for_selector("#expert h2")
        assert page.text_content("#expert h2").endswith(f"expert {expert}")
        box = page.locator("#score").bounding_box()
        page.mouse.click(box["x"] + 32, box["y"] + 25)
        assert page.text_content("#token h2") == "t", "a pointer finds the token that is drawn there"


def gates(found):
    """(expert, gate) of each layer of each token, in the order of the choices."""
    import base64

    import numpy as np

    experts = np.frombuffer(base64.b64decode(found["experts"]), "<i2").reshape(found["shape"])
    weights = np.frombuffer(base64.b64decode(found["gates"]), "<f2").reshape(found["shape"]).astype(float)
    return [
        [list(zip(e, g, strict=True)) for e, g in zip(own, gate, strict=True)]
        for own, gate in zip(experts.tolist(), weights.tolist(), strict=True)
    ]


@slow
def test_states(browser, server, tmp_path):
    with opened(browser, server, "#states") as page:
        page.fill("#state-text", "once upon a time")
        page.click("#new-state .main")
        page.wait_for_selector("#tree .node.chosen")
        name = page.get_attribute("#tree li", "id")
        assert server.ask("GET", f"/v1/states/{name}")[1]["tokens"] == 16
        page.click("#tree button:text-is('Fork')")
        page.wait_for_selector(f"#{name} > ul .node.chosen")
        with page.expect_download() as down:
            page.click(f"#{name} > .node button:text-is('Download')")
        down.value.save_as(tmp_path / "state.safetensors")
        page.click(f"#{name} > .node button:text-is('Delete')")
        page.wait_for_selector(f"#{name}", state="detached")
        assert page.locator("#tree .node").count() == 1
        page.set_input_files("#file", tmp_path / "state.safetensors")
        page.wait_for_selector("#states-told:has-text('took in state')")
        assert page.text_content("#tree .chosen .tail").endswith("once upon a time")
        assert page.locator("#tree .node").count() == 2
        page.click("#tree .chosen button:text-is('Continue')")
        page.wait_for_selector("#after:visible")
        page.fill("[name=temperature]", "0")
        page.fill("[name=max_tokens]", "9")
        made = write(page, "")
        whole = server.post("/v1/completions", prompt="once upon a time", max_tokens=9, temperature=0)
        assert made == whole["choices"][0]["text"]
        page.click("#keep")
        page.wait_for_selector("#told a")


@slow
def test_load(browser, server):
    with opened(browser, server, "#load") as page:
        page.wait_for_selector("#loads .row")
        assert page.text_content("#slots") == "0 of 16" and page.locator("#boxes i").count() == 16
        assert page.locator("#loads .row").count() == 2
        server.post("/v1/completions", prompt="x", max_tokens=400, ignore_eos=True)
        page.wait_for_selector("#speed:not(:text-is('0'))")


@slow
def test_what_goes_wrong_is_said(browser, server, monkeypatch):
    with opened(browser, server, "#write?state=state-0123&text=x") as page:
        page.allowed = ("Failed to load resource",)
        page.click("#go")
        page.wait_for_selector("#problem:visible")
        assert page.text_content("#problem p") == (
            "There is no state 'state-0123'; it may have expired: read its text again."
        )
        page.click("#after button")
        page.fill("[name=max_tokens]", "5")
        write(page, "x")
        assert not page.is_visible("#problem"), "what was wrong is forgotten"
        page.fill("[name=temperature]", "9")
        page.click("#go")
        page.wait_for_selector("#problem:has-text('Temperature')")
        page.fill("[name=temperature]", "1")

        def broken(self):
            raise RuntimeError("a broken step")

        monkeypatch.setattr(Engine, "step", broken)
        page.click("#again")
        page.wait_for_selector("#problem:has-text('a broken step')")
        assert page.input_value("#prompt") == "x", "what was asked for is not lost"
        monkeypatch.undo()
        write(page, "x")
        page.route("**/v1/completions", lambda route: route.abort())
        page.click("#again")
        page.wait_for_selector("#problem:has-text('does not answer')")


@slow
def test_the_key_is_asked_for(browser):
    with running(MODEL, key="se cret") as locked, opened_locked(browser, locked) as page:
        page.wait_for_selector("dialog[open]")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog[open]")
        page.fill("#key", "se cret")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        page.fill("[name=max_tokens]", "5")
        assert write(page, "x").startswith("x")


@contextmanager
def opened_locked(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    yield page
    context.close()


@slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_and_the_keyboard(browser, server, scheme):
    with opened(browser, server, width=400, color_scheme=scheme) as page:
        write(page, "x" * 300)
        for view in ("write", "routing?text=abc", "states", "load"):
            page.evaluate("to => { location.hash = to }", view)
            page.wait_for_selector(f"#{view.split('?')[0]}:visible")
            page.wait_for_timeout(200)
            wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wider <= 0, f"{view} is {wider} pixels too wide"
            unnamed = page.evaluate(
                """() => [...document.querySelectorAll('button, input, textarea, [tabindex="0"]')]
                    .filter(each => each.checkVisibility() && !each.matches('main')
                        && !(each.ariaLabel || each.textContent.trim() || each.labels?.length || each.title))
                    .map(each => each.outerHTML)"""
            )
            assert not unnamed, "each has a name that can be read out"
        page.click("nav a:text-is('Write')")
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert {"Write", "Routing", "States", "Load", "story", "go", "again"} <= set(reached)
