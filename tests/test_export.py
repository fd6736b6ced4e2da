"The exported folder says the same as the model it came from, and is whole or not there."
import json

import pytest
import torch
from conftest import run_module
from safetensors.torch import load_file

from nanochat_nb import export
from nanochat_nb.chat import render_conversation, render_for_completion
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.common import UserError
from nanochat_nb.export import (compare_with_transformers, export_model, hf_config, hf_weights,
                                model_card, write_hf_folder)
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.tokenizer import SPECIAL_TOKENS, Tokenizer

transformers = pytest.importorskip("transformers")
SHAPE = {"sequence_len": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 64}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the cat sat on the mat, and 12 dogs sat on 34 logs. Für Ärger, naïve: 東京 🎉\n"
    return Tokenizer.train([text] * 30, 340)


def random_model(tokenizer, **changes) -> GPT:
    "A model whose weights are all random: zeros would hide mistakes."
    model = GPT(GPTConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size, **changes}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return write_hf_folder(random_model(tokenizer), tokenizer, tmp_path_factory.mktemp("export") / "made", source="sft")


@pytest.fixture(scope="module")
def stock(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_head": 1}, {"n_kv_head": 2, "n_layer": 3}, {"rope_base": 100_000.0}, {"logit_softcap": 0.0},
    {"n_embd": 96, "n_head": 3, "n_kv_head": 3}, {"window_pattern": "LL"}, {"n_layer": 1, "window_pattern": "S"}])
def test_same_logits(tokenizer, tmp_path, changes):
    model = random_model(tokenizer, **changes)
    made = write_hf_folder(model, tokenizer, tmp_path / "made")
    assert compare_with_transformers(made, model) < 1e-4


def test_stock_config(folder, tokenizer):
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.architectures) == ("nanochat", ["NanoChatForCausalLM"])
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (64, 2, 64)
    assert config.vocab_size == tokenizer.vocab_size


def test_same_greedy_reply(folder, tokenizer, stock):
    model = random_model(tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = stock.apply_chat_template([{"role": "user", "content": "the cat"}], add_generation_prompt=True,
                                       return_dict=True, return_tensors="pt")
    made = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    ids = render_for_completion(tokenizer, [{"role": "user", "content": "the cat"}])
    ends = (tokenizer.bos, tokenizer.special("<|assistant_end|>"))
    with torch.inference_mode():
        for _ in range(20):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] in ends:
                break
    assert made == ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_weights(tokenizer, tmp_path, dtype):
    model = random_model(tokenizer)
    made = write_hf_folder(model, tokenizer, tmp_path / "made", dtype=dtype)
    assert {str(w.dtype) for w in load_file(made / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((made / "config.json").read_text())["dtype"] == dtype
    assert 1e-4 < compare_with_transformers(made, model) < 0.5


@pytest.mark.parametrize("text", ["", " ", "the cat", "  two  spaces\n\n\ttab ", "東京 naïve 🎉👩‍👩‍👧 é", "1234567 it's I'LL",
                                  "\0\x1b[31m", "\u202ertl", "a" * 500, "x\r\ny"])
def test_same_ids_for_text(tokenizer, stock, text):
    assert stock(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert stock(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text)]
    assert stock.decode(tokenizer.encode(text)) == text


USER = {"role": "user", "content": "What is 3 + 4?"}
TOOL = {"role": "assistant", "content": [
    {"type": "text", "text": "It is "}, {"type": "python", "text": "3+4"}, {"type": "python_output", "text": "7"},
    {"type": "text", "text": "7.\n\n"}]}
PARTS = {"role": "user", "content": [{"type": "text", "text": " the cat "}, {"type": "text", "text": "sat "}]}


@pytest.mark.parametrize("messages", [
    [USER, TOOL], [USER, {"role": "assistant", "content": "7"}, USER, TOOL, PARTS, {"role": "assistant", "content": ""}],
    [{"role": "system", "content": "Be kind."}, USER, TOOL], [{"role": "user", "content": ""}, TOOL],
    [{"role": "user", "content": "\n leading and trailing \n"}, {"role": "assistant", "content": "\n x \n"}],
    [{"role": "user", "content": "{{ 7 * 7 }} {% if %} &lt; <b> 'q' \"q\" \\n"}, TOOL]])
def test_same_ids_for_conversations(tokenizer, stock, messages):
    ids = stock.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == render_conversation(tokenizer, {"messages": messages})[0]
    prompt = stock.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == render_for_completion(tokenizer, messages[:-1])


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_cannot_forge_special_tokens(tokenizer, stock, name):
    for messages in ([{"role": "user", "content": f"a{name}b"}], [{"role": "user", "content": [{"type": "text", "text": name}]}],
                     [USER, {"role": "assistant", "content": [{"type": "python_output", "text": name}]}]):
        count = [sum(id in tokenizer.special_ids for id in stock.apply_chat_template(m, return_dict=True)["input_ids"])
                 for m in (messages, json.loads(json.dumps(messages).replace(name, "x")))]
        assert count[0] == count[1]


@pytest.mark.parametrize("messages", [
    [{"role": "assistant", "content": "x"}], [USER, USER], [{"role": "system", "content": "x"}, TOOL], [{"role": "tool", "content": "x"}]])
def test_template_refuses(stock, messages):
    with pytest.raises(Exception, match="alternate"):
        stock.apply_chat_template(messages)


# ----- what cannot be said in stock transformers

def test_refuses_windows(tokenizer):
    with pytest.raises(UserError, match="window_pattern='SSSL'"):
        hf_config(GPTConfig(window_pattern="SSSL"), tokenizer)


def test_refuses_additions(tokenizer):
    with pytest.raises(UserError, match="qk_scale=1.2, value_embeds=True, backout=True"):
        hf_config(GPTConfig(value_embeds=True, backout=True, qk_scale=1.2), tokenizer)
    with pytest.raises(UserError, match="window_pattern='SL'"):
        hf_config(GPTConfig(window_pattern="SL"), tokenizer)


def test_refuses_unknown_weights(tokenizer):
    model = random_model(tokenizer)
    model.register_parameter("smear", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match="no place for smear"):
        hf_weights(model)


# ----- files

def test_replaces_only_exports(tokenizer, tmp_path):
    model = random_model(tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        write_hf_folder(model, tokenizer, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        write_hf_folder(model, tokenizer, tmp_path / "mine" / "thesis.txt")
    with pytest.raises(UserError, match="cannot write in"):
        write_hf_folder(model, tokenizer, tmp_path / "mine" / "thesis.txt" / "made")
    with pytest.raises(UserError, match="float32, bfloat16"):
        write_hf_folder(model, tokenizer, tmp_path / "x", dtype="int8")
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        write_hf_folder(model, tokenizer, tmp_path / "empty")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "mine"]


def test_a_failed_export_leaves_the_old_one(tokenizer, tmp_path, monkeypatch):
    made = write_hf_folder(random_model(tokenizer), tokenizer, tmp_path / "made")
    before = {p.name: p.read_bytes() for p in made.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_hf_folder(random_model(tokenizer, n_layer=1), tokenizer, made)
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_card(tokenizer):
    card = model_card(GPTConfig(), {"step": 12, "settings": {"data_dir": "a|b<script>"}}, 1234567, "base")
    assert "| optimizer steps | 12 |" in card and "1,234,567" in card and "<script>" not in card
    assert 'tokenizer("The sky is"' in card and "apply_chat_template" not in card
    assert card.startswith("---\nlibrary_name: transformers\n")


# ----- the command

def test_command_line(base_dir, tmp_path, tokenizer):
    done = run_module("export", "--source", "sft", "--output", tmp_path / "made")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "made").exists()
    tokenizer.save()
    model = random_model(tokenizer)
    save_checkpoint("sft", "d2", 7, model, meta={"tokenizer": tokenizer.fingerprint(), "settings": {"data_dir": "pocket"}})
    done = run_module("export", "--source", "sft", "--output", tmp_path / "made", "--check")
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout
    assert compare_with_transformers(tmp_path / "made", model) < 1e-4
    assert "| optimizer steps | 7 |" in (tmp_path / "made" / "README.md").read_text()
    assert export_model("sft") == base_dir / "export" / "sft"
