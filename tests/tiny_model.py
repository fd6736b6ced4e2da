"A model of one layer with random weights, stored like one that finished SFT: for tests of what chats."
import os

from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.gpt import GPT, GPTConfig
from nanochat_nb.tokenizer import Tokenizer

TEXTS = ["Hello, hello! The lighthouse keeper counted the waves: 1, 2, 3, 4, 5. What is 3 + 4?\n"] * 20


def save_tiny_model(base_dir, stage="sft", sequence_len=256):
    "Write a tokenizer and a checkpoint under `base_dir`; gives the checkpoint's folder."
    previous = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(base_dir)
    try:
        tokenizer = Tokenizer.train(TEXTS, vocab_size=300)
        tokenizer.save()
        model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=tokenizer.vocab_size, n_layer=1,
                              n_head=2, n_kv_head=2, n_embd=64))
        model.init_weights(seed=1)
        meta = {"tokenizer_fingerprint": tokenizer.fingerprint()}
        return save_checkpoint(stage, "d1", 7, model, meta=meta)
    finally:
        os.environ.pop("NANOCHAT_BASE_DIR")
        if previous is not None:
            os.environ["NANOCHAT_BASE_DIR"] = previous
