"""Loading models: the policy or reward model, with or without adapters, and what stands as its reference."""
from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_tools.columns import nearest
from prefopt.last_layer import LastLayer
from prefopt.layout import (
    PRICE,
    Bucketed,
    Layout,
    Packed,
    Padded,
    bucketed,
    on_host,
    packed,
    padded,
    register,
    why_padded,
    window,
)


@dataclass(frozen=True)
class Head:
    """What a model ends in: the class of transformers that loads it, the task as peft calls it, outputs of the head."""
    auto: str = "AutoModelForCausalLM"
    task: str = "CAUSAL_LM"
    outputs: int = 0


LANGUAGE = Head()


def head_of(objective) -> Head:
    """The head that an objective trains: a language model's unless it has `outputs`, at each token if it reads
    `token_reward`, else at the end of the response."""
    if not objective.outputs:
        return LANGUAGE
    if "token_reward" in objective.reads():
        return Head("AutoModelForTokenClassification", "TOKEN_CLS", objective.outputs)
    return Head("AutoModelForSequenceClassification", "SEQ_CLS", objective.outputs)


def check_head(name: str, objective) -> None:
    """An error where a model folder does not end in the head that the objective reads: loading would make one up at random."""
    want, path = head_of(objective), Path(name) / "config.json"
    if not want.outputs or not path.exists():                 # a hub id, an adapter: loading has its own checks
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    made = " ".join(config.get("architectures") or ["an unknown model"])
    if not made.endswith(want.auto.removeprefix("AutoModel")):
        raise ValueError(f"{name} is not a reward model of this recipe: it holds {made}, and that needs a model "
                         f"{want.auto.removeprefix('AutoModel')}. Train one with prefopt reward train, or name its recipe")
    labels = len(config.get("id2label") or {0: "", 1: ""})
    if labels != want.outputs:
        raise ValueError(f"{name} is not a reward model of this recipe: its head has {labels} outputs, and the recipe "
                         f"{want.outputs}")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Trunk:
    """A model as its two halves: tokens -> hidden states, hidden states -> logits (or the outputs of a reward head).

    The halves are checked once against the model's own logits, so that soft-capping, logit scales and other things that
    a model does between them are either reproduced or refused. Language models are causal; a reward model may also be an
    encoder, which is found by trying. Rows are packed where the model allows it; `plain` says why they are not. `calls`
    counts tokens (padding included) and forwards of the body, how many of the tokens with a gradient, and how many there
    would have been in a rectangle of padded rows; `unread` ones, of which the last layer only computes keys and values; and
    positions through the head, backward's included.
    """
    model: nn.Module
    temperature: float = 1.0                                  # logits are divided by it, as they are when sampling
    packing: bool = True
    calls: dict = field(default_factory=lambda: {"tokens": 0, "forwards": 0, "positions": 0, "rectangle": 0,
                                               "trained": 0, "unread": 0})

    def __post_init__(self):
        base = self.model.get_base_model() if is_peft(self.model) else self.model
        self.body, self.output, self.name = base.base_model, base.get_output_embeddings(), type(base).__name__
        self.language = self.output is not None
        if not self.language:
            self.output = next((getattr(base, n) for n in ("score", "classifier") if hasattr(base, n)), None)
        if self.output is None or self.body is base:
            raise ValueError(f"{self.name} has no head that prefopt knows: policies and references are causal language models "
                             f"(AutoModelForCausalLM), reward models have a head for sequence or token classification")
        config = base.config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None) if self.language else None
        self.scale = (getattr(config, "logit_scale", None) or 1.0) if self.language else 1.0
        self.scale /= (getattr(config, "logits_scaling", None) or 1.0) if self.language else 1.0
        self.output_size = sum(p.numel() for p in self.output.parameters())
        self.tokenwise, self.causal = "TokenClassification" in self.name, True
        self.vocabulary, self.layer_count, self.width = (config.vocab_size, config.num_hidden_layers, config.hidden_size)
        self.plain = None if self.packing else "train.packing is off"
        self.plain = self.plain or why_padded(self.body, config)
        self.window, self.price = window(config), PRICE * self.width
        self.config, self.checked, self.flex, self.ends, self.end_size = config, False, False, False, 0

    def __call__(self, layout: Layout) -> Tensor:
        """States (S, D) after the final norm, at `layout.place(row, column)`."""
        return joined(self.run(part).last_hidden_state.flatten(0, 1) for part in self.counted(layout))

    def layers(self, layout: Layout) -> tuple[Tensor, ...]:
        """Hidden states of layers 1..L, each (S, D), the last after the final norm; the embedding output is left out."""
        found = [self.run(part, output_hidden_states=True) for part in self.counted(layout)]
        return tuple(joined(x.flatten(0, 1) for x in states)
                     for states in zip(*((*one.hidden_states[1:-1], one.last_hidden_state) for one in found), strict=True))

    def counted(self, layout: Layout) -> Sequence[Packed | Padded]:
        """What the model runs on, one after the other."""
        parts = layout.parts if isinstance(layout, Bucketed) else (layout,)
        tokens = sum(part.tokens.numel() for part in parts)
        self.calls["tokens"] += tokens
        self.calls["forwards"] += len(parts)
        self.calls["rectangle"] += layout.rectangle
        self.calls["trained"] += tokens * torch.is_grad_enabled()
        if isinstance(layout, Packed) and layout.last:
            self.calls["unread"] += tokens - len(layout.last.read)
        return parts

    def run(self, layout: Packed | Padded, **others):
        """The body's own output."""
        if isinstance(layout, Packed):
            ready = layout.tokens.new_ones(1, 1, 1, 1, dtype=torch.bool)                  # keeps the model from making a mask
            return self.body(input_ids=layout.tokens, position_ids=layout.position, attention_mask=ready, layout=layout,
                             use_cache=False, **others)
        seen = {"use_cache": False} if self.causal else {"attention_mask": layout.attend.long()}
        return self.body(input_ids=layout.tokens, **seen, **others)

    def grade(self, layout: Layout, last: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (N, O) of a reward head at the `last` token of each row, and the states (S, D).

        An encoder ends in what its class does, often a pooled first token.
        """
        if self.causal:
            states = self(layout)
            return self.head(states[last]), states
        found = [self.model(input_ids=part.tokens, output_hidden_states=True, attention_mask=part.attend.long())
                 for part in self.counted(layout)]
        return (joined(one.logits for one in found)[layout.order],
                joined(one.hidden_states[-1].flatten(0, 1) for one in found))

    def layout(self, batch: Mapping[str, Tensor], first: Tensor | None = None) -> Layout:
        """How this model gets the rows of a batch: packed, with what groups begin with computed once where that pays, or those
        of like length together where the model allows no more. Processes that share a model must call it equally often.

        `first` (N, on the CPU where the batch is a Batch) is the first token of each row whose state is read: the states of
        others may be anything.
        """
        if self.packs(batch):
            return packed(batch, self.price, self.flex, first if self.ends else None)
        return padded(batch) if self.divided else bucketed(batch)

    @cached_property
    def divided(self) -> bool:
        """Whether layers are divided over processes."""
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def packs(self, batch: Mapping[str, Tensor]) -> bool:
        if not self.checked:
            self.check(padded(batch).tokens)
        if self.plain or not self.window:
            return not self.plain
        return int(on_host(batch)["attend"].sum(1).max()) <= self.window

    def head(self, hidden: Tensor) -> Tensor:
        """(M, D) -> logits (M, V) over the temperature."""
        logits = self.logits(hidden)
        return logits if self.temperature == 1 else logits / self.temperature

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, D) -> the model's own logits (M, V)."""
        self.calls["positions"] += len(hidden)
        logits = self.output(hidden)
        logits = logits if self.scale == 1 else logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    @torch.no_grad()
    def check(self, tokens: Tensor) -> None:
        """On a small slice, head(body(x)) must be the model's own logits, and no state may change with a later token, but in
        an encoder."""
        pair = tokens[:1, :8].repeat(2, 1)
        pair[1, -1] = (pair[1, -1] + 1) % self.vocabulary
        training, positions = self.model.training, self.calls["positions"]
        self.model.eval()
        hidden = self.body(input_ids=pair).last_hidden_state
        exact = hidden.dtype in (torch.float32, torch.float64)
        gap = relative(hidden[1, :-1], hidden[0, :-1])
        self.causal = gap < (1e-4 if exact else 2e-2)
        base = self.model.get_base_model() if is_peft(self.model) else self.model
        config, pad = base.config.get_text_config(), base.config.get_text_config().pad_token_id
        config.pad_token_id = None                            # of one row without padding, also where it has such a token
        own = self.model(input_ids=pair[:1]).logits
        config.pad_token_id = pad
        at = hidden[0] if self.language or self.tokenwise else hidden[:1, -1]
        ours = self.logits(at).view_as(own) if self.causal or self.tokenwise else own
        self.model.train(training)
        self.calls["positions"] = positions
        if self.language and not self.causal:
            raise ValueError(f"{self.name} is not causal: its states change with later tokens (relative gap {gap:.1e}). "
                             f"Policies and references predict the next token; encoders such as BERT cannot")
        gap = relative(ours, own)
        if not gap < (1e-3 if exact else 2e-2):
            raise ValueError(f"{self.name} changes its logits in a way prefopt does not know (relative gap {gap:.1e} "
                             f"between head(hidden) and the model's logits): please report the model's name")
        self.checked = True
        if not self.causal:
            self.plain = "an encoder sees both ways"
        if self.plain is None:
            self.check_packing(tokens)

    def check_packing(self, tokens: Tensor) -> None:
        """On a small slice, packed rows give the states of padded ones, or rows are not packed, and a warning says so.

        On a GPU FlexAttention comes first, which skips what nobody sees, so that sharing always pays.
        """
        ids = tokens[0, :min(24, 2 * self.window // 3)] if self.window else tokens[0, :24]
        rows = [ids, torch.cat([ids[:-len(ids) // 3], (ids[:len(ids) // 2] + 1) % self.vocabulary]), ids[:5]]
        one = {"tokens": nn.utils.rnn.pad_sequence(rows, batch_first=True), "group": torch.tensor([0, 0, 1], device=ids.device)}
        one["attend"] = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        row, column = one["attend"].nonzero(as_tuple=True)
        training, calls = self.model.training, dict(self.calls)
        self.model.eval()
        register(self.config)
        plain = padded(one)
        expected, problem = self(plain)[plain.place(row, column)], ""
        for flex in (True, False) if tokens.is_cuda else (False,):
            dense = packed(one, flex=flex)
            try:
                found = self(dense)[dense.place(row, column)]
            except Exception as error:                        # a compiler that is not there, a kernel that knows no such shape
                if not flex:
                    raise
                problem = str(error).splitlines()[0]
                continue
            gap = relative(found, expected)
            if gap < (1e-4 if found.dtype in (torch.float32, torch.float64) else 3e-2):
                self.flex, self.price = flex, 0.0 if flex else self.price
                break
            problem = f"packed rows of {self.name} give other states (relative gap {gap:.1e})"
        else:
            self.plain = problem
            warnings.warn(f"{self.plain}: every row is computed by itself, which is slower", stacklevel=2)
        if problem and not self.plain:
            warnings.warn(f"FlexAttention is left out, and packed rows go through sdpa, which is slower: {problem}", stacklevel=2)
        if not self.plain:
            self.check_ends(one, plain, expected)
        self.model.train(training)
        self.calls.update(calls)

    def check_ends(self, one: Mapping[str, Tensor], plain: Padded, expected: Tensor) -> None:
        """On the same slice, the last token of each row has the same state when the last layer leaves out the others."""
        self.end_size = LastLayer.of(self.body)
        row, length = torch.arange(len(plain.tokens), device=plain.tokens.device), one["attend"].sum(1)
        layout = packed(one, flex=self.flex, first=length.cpu() - 1)
        try:
            found = self(layout)[layout.place(row, length - 1)]
        except Exception as error:                            # a part that is called or answers in a way of its own
            problem = f"cannot compute some tokens alone ({(str(error) or type(error).__name__).splitlines()[0]})"
        else:
            gap = relative(found, expected[length.cumsum(0) - 1])
            self.ends = gap < (1e-4 if found.dtype in (torch.float32, torch.float64) else 3e-2)
            problem = f"gives other states for some tokens alone (relative gap {gap:.1e})"
        if not self.ends:
            warnings.warn(f"the last layer of {self.name} {problem}: it computes all of them, which is slower", stacklevel=2)


def joined(parts: Iterable[Tensor]) -> Tensor:
    """One after the other; a single one is not copied."""
    first, *others = parts
    return torch.cat([first, *others]) if others else first


def relative(x: Tensor, y: Tensor) -> float:
    """Largest difference over the largest value of y; 0 where there is nothing to compare."""
    return float((x - y).float().abs().max() / y.float().abs().max().clamp(min=1e-6)) if y.numel() else 0.0


def is_peft(model: nn.Module) -> bool:
    return type(model).__module__.startswith("peft.")


@dataclass
class Models:
    """The policy and, where a recipe reads it, its reference: a frozen copy, another model, or the policy less adapters.
    And a critic, whose head gives a value for each token."""
    policy: nn.Module
    reference: nn.Module | None = None                        # None with adapters: the policy with adapters off
    tokenizer: object = None
    critic: nn.Module | None = None
    temperature: float = 1.0                                  # of the policy whose log-probabilities these are
    sharded: bool = False                                     # over the processes, see prefopt.sharding
    packing: bool = True                                      # of rows, where the models allow it

    def __post_init__(self):
        self._policy = Trunk(self.policy, self.temperature, self.packing)
        self._reference = Trunk(self.reference, self.temperature, self.packing) if self.reference is not None else None
        self._critic = Trunk(self.critic, packing=self.packing) if self.critic is not None else None

    def critic_model(self) -> Trunk:
        if self._critic is None:
            raise ValueError("no critic is loaded, although a column of it is read")
        return self._critic

    def policy_model(self) -> Trunk:
        return self._policy

    @contextmanager
    def reference_model(self) -> Iterator[Trunk]:
        """The reference, in evaluation mode. Call under no_grad."""
        if self._reference is not None:
            yield self._reference
            return
        if not is_peft(self.policy):
            raise ValueError("no reference model is loaded, although a column of it is read")
        training = self.policy.training
        self.policy.eval()
        try:
            with self.policy.disable_adapter():
                yield self._policy
        finally:
            self.policy.train(training)

    def reference_head(self, hidden: Tensor) -> Tensor:
        """The reference's head, at any time: adapters on the head are off while it runs."""
        if self._reference is None and is_peft(self._policy.output):
            with self.reference_model() as reference:
                return reference.head(hidden)
        return (self._reference or self._policy).head(hidden)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.policy.named_parameters() if p.requires_grad]

    def reference_trainable(self) -> list[Tensor]:
        """The reference's counterparts of the policy's trainable parameters, for a reference that moves."""
        own = dict(self.reference.named_parameters())
        missing = [n for n, _ in self.trainable() if n not in own]
        if missing:
            raise ValueError(f"a reference that moves towards the policy must be built like it, and it has no {missing[0]}: "
                             f"leave reference out, so that it starts as a copy of the policy")
        return [own[n] for n, _ in self.trainable()]


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy that never trains. Parameters that do not train in the policy (LoRA's base) are shared."""
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False).eval()


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False):
    """The tokenizer that was saved, whatever the model beside it.

    AutoTokenizer replaces a generic saved tokenizer by the class of the model's type and drops its merges and splitting
    rules without a word (seen in transformers 5.19 with a Qwen2 model); a generic one is therefore loaded as saved.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    try:
        saved = get_tokenizer_config(name, revision=revision, trust_remote_code=trust_remote_code).get("tokenizer_class")
        home = PreTrainedTokenizerFast if saved in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer
        return home.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {str(error).splitlines()[0]}. Set tokenizer to a "
                         f"folder with tokenizer.json, or to a hub id") from None


def load_policy(name: str, *, dtype: str = "float32", attention: str | None = None, revision: str | None = None,
                trust_remote_code: bool = False, quantize: int | None = None, lora: dict | None = None,
                gradient_checkpointing: bool = False, dropout: bool = False, head: Head = LANGUAGE) -> nn.Module:
    """A model ready to train; `lora` holds arguments of peft.LoraConfig, `quantize` 4 or 8 bits (QLoRA).

    `head` makes it a reward model: the body of a language model or an encoder under a head that starts at random, unless
    the folder has one of that size.

    A folder with an adapter (adapter_config.json) loads its base model and goes on training the adapter. Weights are read
    from safetensors only. Raises ValueError where the folder or hub id holds no such model, or not all of one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}; dtypes: {', '.join(DTYPES)}")
    extra = {"attn_implementation": attention} if attention else {}
    if quantize:
        extra["quantization_config"] = _quantization(quantize, DTYPES[dtype])
    adapter = Path(name) if (Path(name) / "adapter_config.json").exists() else None
    if adapter:
        name = _base_of(adapter, lora)
    model = _whole(name, head, dtype=DTYPES[dtype], revision=revision, trust_remote_code=trust_remote_code, **extra)
    if not dropout:
        disable_dropout(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if quantize:
        from peft import prepare_model_for_kbit_training
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing,
                                                gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    elif lora:
        from peft import LoraConfig, get_peft_model
        lora = {"task_type": head.task, "target_modules": "all-linear", **lora}
        model = get_peft_model(model, LoraConfig(**lora))
    return model.train()


def _whole(name: str, head: Head, **arguments) -> nn.Module:
    """A model all of whose weights were found: none is left at random, but for the head of a new reward model."""
    import transformers
    extra = {"num_labels": head.outputs, "ignore_mismatched_sizes": True} if head.outputs else {}
    what = "causal language model" if head is LANGUAGE else "reward model"
    loud = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()                # its table of missing weights: we say what is wrong ourselves
    try:
        model, found = getattr(transformers, head.auto).from_pretrained(name, use_safetensors=True, output_loading_info=True,
                                                                        **extra, **arguments)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        said = said if len(said) < 400 else f"{said[:240]} ... {said[-120:]}"
        raise ValueError(f"cannot load {name!r} as a {what} (a folder with config.json and safetensors, or a hub id): "
                         f"{said}") from error
    finally:
        transformers.logging.set_verbosity(loud)
    own = f"{model.base_model_prefix}."                       # of the body; a new head is outside of it
    missing = sorted(k for k in found["missing_keys"] if not head.outputs or k.startswith(own) and ".pooler." not in k)
    if missing:
        raise ValueError(f"{name!r} lacks weights of {type(model).__name__}: {', '.join(missing[:4])}. It was saved from "
                         f"another kind of model" + ("; policies and references are causal language models"
                                                     if head is LANGUAGE else ""))
    for p in model.parameters():                              # in a file tensors begin anywhere; kernels round otherwise there
        if p.data_ptr() % 64:
            p.data = p.data.clone()
    return model


def prepare_padding(tokenizer, model: nn.Module | None = None) -> None:
    """A padding token that no text ends with, for tokenizers that have none or pad with EOS, and the model told of it.

    transformers reads the score of a padded row at its last token that is not padding, which must be the row's end.
    The unknown or the first token serves; where they are EOS too, a token is added, and the model gets a row for it.
    """
    if model is not None:
        config = model.get_base_model().config if is_peft(model) else model.config
        config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
        if len(tokenizer) > config.get_text_config().vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:                       # an encoder's
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        other = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t not in (None, tokenizer.eos_token)]
        if other:
            tokenizer.pad_token = other[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def _base_of(adapter: Path, lora: dict | None) -> str:
    """The model an adapter was trained on, after checks that it can go on."""
    from peft import PeftConfig
    if lora:
        raise ValueError(f"{adapter} holds an adapter, which goes on training, and lora asks for a new one: leave lora out, "
                         f"or merge the adapter into its model first")
    if not (adapter / "adapter_model.safetensors").exists():
        raise ValueError(f"{adapter} has adapter_config.json but no adapter_model.safetensors: save the adapter again with "
                         f"a current peft, which writes safetensors")
    return PeftConfig.from_pretrained(adapter).base_model_name_or_path


def disable_dropout(model: nn.Module) -> None:
    """Dropout is an nn.Dropout, or a number that modules copy from the config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)


def _quantization(bits: int, dtype: torch.dtype):
    from importlib.util import find_spec
    if bits not in (4, 8):
        raise ValueError(f"policy.quantize must be 4 or 8 bits, found {bits}")
    if find_spec("bitsandbytes") is None:
        raise ImportError("policy.quantize needs the package bitsandbytes: pip install 'prefopt[quantize]'")
    from transformers import BitsAndBytesConfig
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=True)
