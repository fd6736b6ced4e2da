"The terminal as a process, with a pipe and with a real terminal, and the widget without a browser."
import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_model import save_tiny_model

from nanochat_nb.common import UserError
from nanochat_nb.terminal import chat_loop, printable, reply_once, show_reply, stop_on_interrupt, terminal_chat


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    return folder


def terminal(base_dir, *flags, text=None, **options):
    command = [sys.executable, "-m", "nanochat_nb.terminal", *flags]
    return subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=60,
                          env={**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONIOENCODING": "utf-8"}, **options)


# ---------------------------------------------------------------- the terminal as a process

def test_one_prompt(model_dir, tmp_path, monkeypatch, capsys):
    flags = ["--prompt=Hello!", "--seed=3", "--max_tokens=12", "--device_type=cpu"]
    run = terminal(model_dir, *flags, cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == "" and run.stdout.endswith("\n") and run.stdout.strip()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(model_dir))
    terminal_chat(prompt="Hello!", seed=3, max_tokens=12, device_type="cpu")
    assert capsys.readouterr().out == run.stdout               # same seed, same reply


def test_a_pipe_of_many_turns(model_dir):
    lines = ["Hello!", "", "x" * 3000, *["hello " * 20] * 8, "/new", "what", "/quit", "no"]
    run = terminal(model_dir, "--source=sft", "--max_tokens=4", text="\n".join(lines))
    assert run.returncode == 0 and ">" not in run.stderr       # remarks, no prompts
    for remark in ("A new conversation.", "shorten it", "no longer fit"):
        assert remark in run.stderr
    assert run.stdout.count("\n") >= 9


@pytest.mark.parametrize("flags, words", [
    ({"source": "rl"}, "reinforcement"), ({"source": "what"}, "not one of"), ({"temperature": -1.0}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"), ({"model_tag": "d99"}, "d99"), ({"device_type": "tpu"}, "tpu"),
])
def test_bad_flags_are_refused(model_dir, monkeypatch, flags, words):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(model_dir))
    with pytest.raises(UserError) as caught:
        terminal_chat(prompt="hi", **flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_trained_yet_is_one_line(tmp_path):
    run = terminal(tmp_path, "--prompt=hi")
    assert run.returncode == 2 and "speedrun.sh" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_a_real_terminal(model_dir):
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(sys.executable, ["-m", "nanochat_nb.terminal", "--max_tokens=200"], timeout=30,
                          encoding="utf-8", codec_errors="replace",
                          env={**os.environ, "NANOCHAT_BASE_DIR": str(model_dir), "TERM": "dumb"})
    child.expect("million parameters")
    child.expect("> ")
    child.sendline("/help")
    child.expect("/new starts over")
    child.expect("> ")
    child.sendline("hello")
    time.sleep(0.2)
    child.sendintr()                                           # stops the reply, if it is still running
    child.expect("> ")
    child.sendintr()                                           # leaves
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and "Traceback" not in (child.before or "")


# ---------------------------------------------------------------- the terminal's parts

def actor(messages, params, cancelled):
    "Counts until it is cancelled; what it does first depends on the question."
    question = messages[-1]["content"]
    if question == "too long":
        raise UserError("shorten it.")
    if question == "dangling":
        yield {"type": "text", "text": "so "}
        yield {"type": "python", "text": "1+1"}
    for n in range(5):
        if cancelled():
            yield {"type": "end", "finish_reason": "cancelled", "dropped_turns": 0, "tokens": n}
            return
        if question == "interrupt" and n == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        if question not in ("silent", "dangling"):
            yield {"type": "text", "text": f"{n} "}
    yield {"type": "end", "finish_reason": "length" if question == "dangling" else "stop", "dropped_turns": 0, "tokens": 5}


def converse(*lines):
    "Run the loop over lines of input; gives what was shown and what was noted."
    shown, notes, lines = [], [], iter(lines)

    def read():
        for line in lines:
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line
        raise EOFError
    chat_loop(actor, {}, read, shown.append, notes.append)
    return "".join(shown), notes


def test_loop():
    assert converse("a", "b") == ("0 1 2 3 4 \n" * 2, [])
    assert converse("a", "/quit", "b") == converse("a", "exit", "b") == ("0 1 2 3 4 \n", [])
    assert converse("a", KeyboardInterrupt, "b") == ("0 1 2 3 4 \n", [])
    assert converse("too long", "a") == ("0 1 2 3 4 \n", ["shorten it."])
    assert converse("silent", "a")[0].count("0 1 2") == 1
    shown, notes = converse("dangling")
    assert shown == "so [1+1]\n" and "--max_tokens" in notes[0]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_keeps_what_was_said():
    messages = [{"role": "user", "content": "interrupt"}]
    end = reply_once(actor, messages, {}, lambda text: None)
    assert end["finish_reason"] == "cancelled"
    assert messages[1]["content"] == [{"type": "text", "text": "0 1 2 "}]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    assert stop.is_set() and signal.getsignal(signal.SIGINT) is before


def test_control_characters_are_shown_not_obeyed():
    events = [{"type": "text", "text": "\x1b]0;owned\x07 ok\r\n\tnaïve 🙂"}, {"type": "end", "finish_reason": "stop"}]
    shown = []
    parts, _ = show_reply(events, shown.append)
    assert "".join(shown) == "\ufffd]0;owned\ufffd ok\ufffd\n\tnaïve 🙂" == printable(events[0]["text"])
    assert parts[0]["text"] == events[0]["text"]               # the model gets back what it said


# ---------------------------------------------------------------- the widget

widget = pytest.importorskip("nanochat_nb.widget")


@pytest.fixture()
def chat():
    pytest.importorskip("ipywidgets")
    return widget.chat_widget(actor)


def ask(chat, text):
    chat.text.value = text
    chat.send.click()


def test_widget_outside_a_notebook(chat):
    ask(chat, "hello")
    ask(chat, "  ")
    ask(chat, "again")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.view.value.count("0 1 2 3 4") == 2 and chat.text.value == ""
    assert (chat.send.disabled, chat.stop.disabled) == (False, True)
    chat.new.click()
    assert chat.messages == [] and chat.view.value == ""


def test_widget_shows_errors_and_takes_the_turn_back(chat):
    ask(chat, "too long")
    assert chat.messages == [] and "shorten it" in chat.view.value
    ask(chat, "<script>alert(1)</script><img src=x onerror=alert(1)>")
    assert "<script" not in chat.view.value and "<img" not in chat.view.value
    ask(chat, "dangling")
    assert chat.view.value.count("<span") == chat.view.value.count("</span>") == 1


def test_widget_stop_and_new_chat_while_it_replies():
    pytest.importorskip("ipywidgets")

    def slow(messages, params, cancelled):
        for n in range(200):
            if cancelled():
                break
            time.sleep(0.01)
            yield {"type": "text", "text": f"{n} "}
        yield {"type": "end", "finish_reason": "cancelled", "dropped_turns": 0, "tokens": n}

    async def scenario():
        chat = widget.chat_widget(slow)
        ask(chat, "go")
        await asyncio.sleep(0.15)
        assert chat.send.disabled and not chat.stop.disabled and "0 1 2" in chat.view.value
        ask(chat, "I am impatient")                            # nothing happens while it replies
        assert len(chat.messages) == 2
        task = chat.task
        chat.stop.click()
        await asyncio.wait_for(task, 2)
        assert "Stopped." in chat.view.value and not chat.send.disabled
        chat.text.value = "go"
        chat.send.click()
        await asyncio.sleep(0.05)
        task = chat.task
        chat.new.click()
        ask(chat, "a new one")
        await asyncio.wait_for(task, 2)
        assert len(chat.messages) == 2 and "I am" not in chat.view.value and "go" not in chat.view.value
        chat.stop.click()
        await asyncio.wait_for(chat.task, 2)
    asyncio.run(scenario())


def test_widget_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(UserError, match=r'pip install "nanochat_nb\[notebook\]"'):
        widget.chat_widget(actor)
