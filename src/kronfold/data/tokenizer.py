"""A byte-level BPE tokenizer trained from scratch, in the form that `transformers` loads."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kronfold.base.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_SMALLEST = 257  # 256 bytes and the end-of-text token


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` entries, GPT-2's kind: any text encodes, and decodes back exactly.

    `<|endoftext|>` has id 0 and is beginning, end, padding and unknown token. The same documents give the same
    tokenizer. Raises DataError for a vocabulary below 257 entries or when there is no text.
    """
    if vocab_size < _SMALLEST:
        raise DataError(f"vocab_size is {vocab_size}; byte-level BPE needs at least {_SMALLEST} entries.")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    if core.get_vocab_size() <= _SMALLEST:
        raise DataError("Cannot train a tokenizer: the documents hold no text to learn from. Give more text.")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
