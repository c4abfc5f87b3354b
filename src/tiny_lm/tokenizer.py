"""The byte-level BPE tokenizer of the embedded model."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CONTEXT = 1024

# BPE merges within a piece only. Pieces are phrases that every program repeats, module names, class
# names, keywords with their `=`, and values. The last two alternatives match all other text.
PIECES = (
    r"def build_model\(x_train, y_train\):\n",
    r" {4}x_train, x_val, y_train, y_val = train_test_split\(x_train, y_train, test_size=",
    r" {4}from sklearn\.",
    r"[a-z_]+ import ",
    r" {4}return ",
    r" {4}[a-z_]+ = ",
    r" {4}[a-z]+(?=\.fit)",
    r"\.fit\(x_train, y_train\)\n",
    r" {4}x_train = |\.fit_transform\(x_train\)\n",
    r"# (?:failed|repaired|improved):\n|# scores ",
    r" training rows, | features, | classes\n",
    r"[A-Z][A-Za-z]+",
    r"[a-zA-Z_]+=",
    r"train_test_split\n|make_pipeline[\n(]",
    r"[0-9]+(?:\.[0-9]+|e-[0-9]+)?",
    r"'[a-z_]+'",
    r" ?[a-zA-Z_]+(?: [a-z]+)*",
    r"\)+\n?|\(|[^\w\s()]+ ?",
    r"\n| +|\s|.",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lossless BPE with `vocab_size` tokens that adds no special tokens to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(PIECES)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        add_bos_token=False,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
    )
