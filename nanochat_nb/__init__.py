"""nanochat_nb: the book that is also the software.

    text → tokenizer → packed batches → GPT → optimizer → pretraining → evaluation
         → mid-training → SFT → RL → serving

Every module below is generated from the notebook of the same name (`nbs/NN_name.ipynb`), and
imports only modules of lessons above it and its own companions.  Bold lessons of the book are
marked `*`, companions stand below their lesson.

    common          device, compute dtype, ranks, seeds, paths, run log, errors
  * tokenizer       byte-level BPE, special tokens, bytes per token
  * dataset         text as shards: the built-in world, a folder, or the hub
    pocket          the built-in world: its text, its variety, and a check for leaked test items
    grammar         sentences with holes; what is held out
    islands         a table of facts in many phrasings
    stories         small simulations that can be asked about
    skills          sums, spelling, everyday things, small functions
    practice        conversations, tasks and few-shot tests
    dataloader      documents → packed (B, T) batches with an exact, resumable state
    download        shards from the hub: resumed, retried, checked, atomic
  * gpt             GPTConfig, blocks, GPT; parameter and FLOP counts
    attention       one call, several backends; windows; KV cache
    loss            cross-entropy without holding all logits
    precision       fp32, bf16, fp16, fp8: the linear layer, the loss scaler
  * optimizer       AdamW and Muon, the same step on 1 or N ranks; schedules
    memory          what training holds, predicted and measured
  * pretraining     bits per byte, the training loop, base models
    checkpoint      atomic, checksummed, resumable at any number of ranks
    scaling         depth → width, batch, rates, horizon; what a run will cost
    faults          what ends a run, told in one line: NaN, a lost rank, a signal, memory
  * evaluation      CORE, bits per byte, samples
    engine          prefill, decode, many requests in one batch that come and go, streaming
    sampling        which token: temperature, top-k, top-p, min-p, penalty, stop texts
    quantization    weights as a generator reads them: packed, in 8 or 4 bits
    speculation     guessed tokens judged in one pass, the same text
    harness         a bridge to lm-evaluation-harness
    scoring         likelihoods of many answers at once
    kernels         a decode step in C++, where there is a compiler
  * finetuning      mid-training and supervised finetuning
    chat            conversation ⇄ tokens and masks; the calculator tool
    tasks           questions with answers, as conversations; mixtures
    execution       model-written Python in a sandbox
    chat_eval       task accuracies and ChatCORE
  * reinforcement   rollouts, advantages, policy gradient
  * serving         HTTP: the chat page and an OpenAI-compatible API
    terminal        chat in the terminal
    widget          chat in a notebook
    report          the report card of a run
    export          a Hugging Face folder
"""
__version__ = "0.1.0"
