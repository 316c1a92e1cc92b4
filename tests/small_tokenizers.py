"""Tokenizers made on the spot: one whose ids can be read off by hand, and small ones of the kinds in use."""
from __future__ import annotations

from functools import cache

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXTS = ["The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x + 1\n",
         "Question: what is 2 + 2?\nAnswer:", "It is 4, of course. It is not 5.", "user assistant system tool",
         "A naïve café – 12345 – ünïcode \t tabs\r\n"]


class Letters:
    """A slow tokenizer whose ids are code points; ^ is BOS (1), $ is EOS (2). It remembers every text it encodes.

    Its chat template writes a turn as the first letter of the role, ':', the content and ';'; the beginning of the
    assistant's turn is 'a:'. Consecutive tool turns share one 't:'.
    """
    is_fast = False
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    special = {"^": 1, "$": 2}

    def __init__(self, *, bos: bool = True, template: bool = True):
        self.bos, self.seen = bos, []
        self.chat_template = "letters" if template else None

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return {"input_ids": self([texts], add_special_tokens)["input_ids"][0]}
        self.seen += texts
        start = [1] if self.bos and add_special_tokens else []
        return {"input_ids": [start + [self.special.get(c, ord(c)) for c in text] for text in texts]}

    def apply_chat_template(self, messages, *, tools, chat_template, add_generation_prompt, tokenize, mark=""):
        template = chat_template or self.chat_template
        if any(m["role"] == "villain" for m in messages):
            raise RuntimeError("Only user and assistant roles are supported!")
        out, previous = "".join(f"T{tool};" for tool in tools or ()), None
        for n, message in enumerate(messages):
            content = message["content"]
            if template == "rewriting" and message["role"] == "assistant":
                content = f"<{len(messages) - n}>{content}"
            same = message["role"] == previous == "tool"
            out = f"{out[:-1]},{content};" if same else f"{out}{message['role'][0]}:{content};"
            previous = message["role"]
        return out + mark + "a:" * add_generation_prompt

    def get_vocab(self):
        return self.special


def ids(text: str) -> list[int]:
    """What Letters makes of a text.

    >>> ids("^hi$")
    [1, 104, 105, 2]
    """
    return [Letters.special.get(c, ord(c)) for c in text]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


@cache
def _trained(kind: str) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    if kind == "bytes":                                       # as in GPT-2, Llama 3, Qwen
        backend, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:                                                     # as in Llama 2 and Mistral: a space in front of texts
        backend, alphabet = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True)), sorted(set("".join(TEXTS)))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=True)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=450, special_tokens=special,
                                                               initial_alphabet=alphabet, show_progress=False))
    return backend.to_str()


def fast(kind: str = "bytes", *, bos: bool = False, template: str | None = CHATML):
    """A fast tokenizer with <s>, </s> and <pad>; kind "bytes", or "always" or "first" for SentencePiece's spaces."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer.from_str(_trained(kind))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer
