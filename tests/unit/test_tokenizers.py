"""Vocabularies and chat templates as they come with models: ids against a direct implementation, damage, ends."""

from __future__ import annotations

import collections
import itertools
import logging
import random

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dspark_stream.config import default_cache_dir
from dspark_stream.errors import InvalidRequestError, ModelLoadError
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.loading import _end_ids, load_target
from dspark_stream.models.tokenizer import BYTE_OF, TextCodec, codec_from_gguf, codec_from_hub
from dspark_stream.models.vocabulary import BYTE, CONTROL, CUTS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, end_ids
from tiny import tiny_target

G = "tokenizer.ggml."
CORPUS = "the theory of the other thing: while (i < 10) { then += there; } naïve café 日本語 日本 — the  end\n" * 3
TEXTS = [
    "", " ", "the other thing", " leading", "trailing ", "a  b   c", "\n\n\tif (x) {\n    return 10;\n}\n",
    "naïve 日本語日本", "🦙👩\u200d👩\u200d👧\u200d👦 e\u0301 \u200b\u00a0\x00\U0010ffff", "0123456789",
    "tttthhhhthethe",
    "<0x41> </s> ▁the", "x" * 300, "の" * 50, "<s>the</s> then<s>", "<|end|>the", "  <|end|>  the",
]  # fmt: skip


def learned_pieces(count: int = 150) -> list[str]:
    """Tokens of several characters as training finds them: the most frequent pair of neighbours, again and again."""
    words = collections.Counter("▁" + word for word in CORPUS.replace("\n", "").split(" "))
    split, pieces = {word: list(word) for word in words}, []
    for _ in range(count):
        pairs = collections.Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append("".join(best))
        for parts in split.values():
            for i in range(len(parts) - 1, 0, -1):
                if i < len(parts) and (parts[i - 1], parts[i]) == best:
                    parts[i - 1 : i + 1] = [pieces[-1]]
    return list(dict.fromkeys(pieces))


def sentence_piece_fields(**change):
    """A vocabulary like Llama 2's, with a token of the user's own."""
    pieces = learned_pieces()
    letters = sorted(set("▁" + CORPUS.replace("\n", "").replace(" ", "")))
    rows = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0), ("<|end|>", USER_DEFINED, 0.0)]
    rows += [(f"<0x{b:02X}>", BYTE, 0.0) for b in range(256)]
    rows += [(text, NORMAL, -float(i)) for i, text in enumerate([*pieces, *letters])]
    fields = {"model": "llama", "tokens": [r[0] for r in rows], "token_type": [r[1] for r in rows],
              "scores": [r[2] for r in rows], "bos_token_id": 1, "eos_token_id": 2,
              "unknown_token_id": 0} | change  # fmt: skip
    return {G + name: value for name, value in fields.items() if value is not None}


def byte_level_fields(pre="qwen2", **change):
    letters = [c for c, _ in sorted(BYTE_OF.items(), key=lambda item: item[1])]
    merges = ["t h", "th e", "Ġ the", "1 2", "12 3", "Ġ Ġ", "Ċ Ċ"]
    tokens = [*letters, *(m.replace(" ", "") for m in merges), "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>"]
    types = [NORMAL] * (len(tokens) - 4) + [CONTROL] * 3 + [USER_DEFINED]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types,
              "eos_token_id": tokens.index("<|endoftext|>")} | change  # fmt: skip
    return {G + name: value for name, value in fields.items() if value is not None}


class SentencePiece:
    """The algorithm told directly: of all neighbours that together are a token, the best score first, from the left."""

    def __init__(self, fields, prefixed):
        tokens, types = fields[G + "tokens"], fields[G + "token_type"]
        self.ids, self.prefixed = {t: i for i, t in enumerate(tokens)}, prefixed
        self.scores = {
            t: s for t, s, k in zip(tokens, fields[G + "scores"], types, strict=True) if k in (NORMAL, UNUSED)
        }
        own = [t for t, k in zip(tokens, types, strict=True) if k in (CONTROL, UNKNOWN, USER_DEFINED)]
        self.own = collections.defaultdict(list)
        for token in sorted(own, key=len, reverse=True):
            self.own[token[0]].append(token)

    def encode(self, text):
        out, start, at = [], 0, 0
        while at < len(text):
            token = next((t for t in self.own[text[at]] if text.startswith(t, at)), None)
            if token is None:
                at += 1
                continue
            out += [*self.merge(text[start:at]), self.ids[token]]
            start = at = at + len(token)
        return out + self.merge(text[start:])

    def merge(self, text):
        parts = list((("▁" if self.prefixed and text else "") + text).replace(" ", "▁"))
        while True:
            found = [
                (-self.scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in self.scores
            ]
            if not found:
                break
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [
            i
            for p in parts
            for i in ([self.ids[p]] if p in self.scores else [self.ids[f"<0x{b:02X}>"] for b in p.encode()])
        ]


def check_against_direct(fields, prefixed, texts):
    codec, direct = codec_from_gguf(fields), SentencePiece(fields, prefixed)
    types, tokens = fields[G + "token_type"], fields[G + "tokens"]
    for text in texts:
        ids = codec.encode(text)
        assert ids == direct.encode(text), text
        own = [tokens[i].encode() if types[i] in (CONTROL, UNKNOWN) else codec.token_bytes[i] for i in ids]
        read = b"".join(own).decode()
        if not prefixed:
            assert read == text.replace("▁", " ")
        if not any(types[i] in (CONTROL, UNKNOWN, USER_DEFINED) for i in ids):
            assert codec.decode(ids) == text.replace("▁", " ")
        assert len(text.encode()) <= len(ids) * codec.max_token_bytes


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_piece_ids_are_those_of_merging_by_score(prefixed):
    """Guards against other ids than the model was trained with: worse text and no error."""
    fields = sentence_piece_fields(add_space_prefix=prefixed)
    rng = random.Random(0)
    pieces = [t.replace("▁", " ") for t in fields[G + "tokens"][260:]]
    mixed = ["".join(rng.choices([*pieces, " ", "\n", "é", "🦙"], k=rng.randint(1, 30))) for _ in range(200)]
    check_against_direct(fields, prefixed, [*TEXTS, *mixed])


@pytest.mark.slow
def test_gemmas_own_vocabulary():
    path = default_cache_dir() / "models" / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip(f"no {path}")
    fields, rng = GgufFile(path).fields, random.Random(0)
    tokens = [t.replace("▁", " ") for t in fields[G + "tokens"]]
    mixed = ["".join(rng.choices(tokens, k=rng.randint(1, 12))) for _ in range(300)]
    check_against_direct(fields, False, [*TEXTS, *mixed])
    assert codec_from_gguf(fields).encode_chat([("user", "hi")])[0] == fields[G + "bos_token_id"]


def test_what_sentence_piece_files_need_not_say():
    """Llama 2's first files name neither special tokens nor the prefix; old ones of Gemma have spaces as ▁."""
    fields = sentence_piece_fields(bos_token_id=None, eos_token_id=2**32 - 1, unknown_token_id=None)
    codec = codec_from_gguf(fields)
    assert codec.special == {"bos_token": "<s>", "eos_token": None, "unk_token": "<unk>"}
    assert codec.encode("the") == SentencePiece(fields, True).encode("the")
    tokens = fields[G + "tokens"]
    tokens[3] = "▁▁▁"
    codec = codec_from_gguf(fields | {G + "tokens": tokens})
    assert codec.encode("a   b").count(3) == 1
    assert codec.token_bytes[3] == b"   "


def test_gemma_4_merges_as_written_over_sentence_pieces():
    tokens = ["<unk>", "<bos>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "\n", "\n\n", "▁a", "▁ab"]
    types = [UNKNOWN, CONTROL, *[BYTE] * 256, *[NORMAL] * 7]
    fields = {G + "model": "gemma4", G + "tokens": tokens, G + "token_type": types, G + "unknown_token_id": 0,
              G + "merges": ["▁ a", "▁a b"], G + "bos_token_id": 1, G + "add_bos_token": True}  # fmt: skip
    codec = codec_from_gguf(fields)
    text = " ab\n\nab é"
    assert [tokens[i] for i in codec.encode(text)] == ["▁ab", "\n\n", "a", "b", "▁", "<0xC3>", "<0xA9>"]
    assert codec.decode(codec.encode(text)) == text


CUT_TEXTS = {
    "llama-bpe": "I|'M| sure| | it| is| |123|45|.\n\n|getHTTPCode|'s",
    "qwen2": "I|'M| sure| | it| is| |1|2|3|4|5|.\n\n|getHTTPCode|'s",
    "gpt-2": "I|'|M| sure| | it| is| 12345|.|\n|\n|getHTTPCode|'s",
    "smollm": "I|'|M| sure| | it| is| |1|2|3|4|5|.|\n|\n|getHTTPCode|'s",
    "default": "I|'|M| sure| | it| is| |123|45|.|\n|\n|getHTTPCode|'|s",
    "gpt-4o": "I'M| sure| | it| is| |123|45|.\n\n|get|HTTPCode's",
    "tekken": "I|'M| sure| | it| is| |1|2|3|4|5|.\n\n|get|HTTPCode|'s",
    "deepseek-coder": "I|'|M| sure| | it| is| |1|2|3|4|5|.|\n|\n|getHTTPCode|'|s",
    "deepseek-v3": "I|'M| sure| | it| is| |123|45|.\n\n|getHTTPCode|'s",
}


@pytest.mark.parametrize("pre", CUT_TEXTS)
def test_text_is_cut_as_the_file_was_made_for(pre):
    raw = codec_from_gguf(byte_level_fields(pre)).raw
    text = "I'M sure  it is 12345.\n\ngetHTTPCode's"
    assert "|".join(text[a:b] for _, (a, b) in raw.pre_tokenizer.pre_tokenize_str(text)) == CUT_TEXTS[pre]


def test_marks_belong_to_words_where_the_file_says_so():
    text = "हिन्दी"  # letters and the signs that belong to them
    cut = {
        pre: codec_from_gguf(byte_level_fields(pre)).raw.pre_tokenizer.pre_tokenize_str(text)
        for pre in ("qwen2", "qwen35")
    }
    assert len(cut["qwen35"]) == 1
    assert len(cut["qwen2"]) > 1


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_texts_come_back(pre):
    codec = codec_from_gguf(byte_level_fields(pre))
    for text in TEXTS:
        ids = codec.encode(text)
        assert b"".join(codec.token_bytes[i] for i in ids).decode() == codec.decode(ids) == text


def test_tokens_that_no_text_stands_for(caplog):
    fields = byte_level_fields("llama-bpe")
    fields[G + "tokens"] += ["[PAD]", "123456", ""]
    fields[G + "token_type"] += [UNUSED, NORMAL, NORMAL]
    codec = codec_from_gguf(fields)
    pad = len(fields[G + "tokens"]) - 3
    assert codec.token_bytes[pad] == b""
    assert codec.decode([pad]) == ""
    assert pad not in codec.encode("[PAD]")
    assert codec.token_bytes[pad + 1] == b"123456"
    think = fields[G + "tokens"].index("<think>")
    assert codec.encode("<think>") == [think]
    assert codec.token_bytes[think] == b"<think>"
    assert codec.token_bytes[think - 1] == b""
    assert not caplog.records
    codec_from_gguf({k: v for k, v in fields.items() if k != G + "pre"})
    assert "tokenizer.ggml.pre" in caplog.text


def test_llama_3_takes_a_piece_that_is_a_token_whole():
    """Its merges do not lead to every token."""
    fields = byte_level_fields("llama-bpe")
    fields[G + "tokens"] += ["Ġhello"]
    fields[G + "token_type"] += [NORMAL]
    last = len(fields[G + "tokens"]) - 1
    assert codec_from_gguf(fields).encode(" hello") == [last]
    assert codec_from_gguf(fields | {G + "pre": "qwen2"}).encode(" hello") != [last]


DAMAGE = [
    (byte_level_fields, {"tokens": None}, "tokens"),
    (byte_level_fields, {"tokens": []}, "tokens"),
    (byte_level_fields, {"tokens": "abc"}, "tokens"),
    (byte_level_fields, {"tokens": [1, 2, 3]}, "tokens"),
    (byte_level_fields, {"tokens": ["a", "b", "a"], "merges": ["a b"]}, "tokens.*0 and 2"),
    (byte_level_fields, {"merges": None}, "merges"),
    (byte_level_fields, {"merges": 7}, "merges"),
    (byte_level_fields, {"merges": ["t h", 5]}, "merges"),
    (byte_level_fields, {"merges": ["t h", "th"]}, "merges.*merge 1.*no space"),
    (byte_level_fields, {"merges": ["t h", "t nowhere"]}, "merges.*'nowhere', which is no token"),
    (byte_level_fields, {"merges": ["x y"]}, "merges.*'xy', which is no token"),
    (byte_level_fields, {"token_type": [1, 1]}, "token_type.*2 entries"),
    (byte_level_fields, {"token_type": [9] * 267}, "token_type.*unknown type 9"),
    (byte_level_fields, {"token_type": ["a"] * 267}, "token_type"),
    (byte_level_fields, {"bos_token_id": 5000}, "bos_token_id.*5000"),
    (byte_level_fields, {"eos_token_id": -3}, "eos_token_id"),
    (byte_level_fields, {"eos_token_id": "two"}, "eos_token_id"),
    (byte_level_fields, {"eos_token_id": True}, "eos_token_id"),
    (byte_level_fields, {"eot_token_id": 267}, "eot_token_id"),
    (byte_level_fields, {"add_bos_token": "yes"}, "add_bos_token"),
    (byte_level_fields, {"pre": "of-tomorrow"}, "of-tomorrow.*known: .*llama-bpe"),
    (byte_level_fields, {"pre": ["qwen2"]}, "qwen2.*not supported"),
    (byte_level_fields, {"model": "rwkv"}, "rwkv.*known: gpt2, llama"),
    (byte_level_fields, {"model": ["gpt2"]}, "tokenizer.ggml.model"),
    (byte_level_fields, {"model": None}, "tokenizer.ggml.model"),
    (sentence_piece_fields, {"scores": None}, "scores"),
    (sentence_piece_fields, {"scores": [0.0]}, "scores.*1 entries"),
    (sentence_piece_fields, {"scores": [float("nan")] * 440}, "scores"),
    (sentence_piece_fields, {"token_type": [BYTE] * 440}, "token 0 is '<unk>'"),
    (sentence_piece_fields, {"add_space_prefix": 1}, "add_space_prefix"),
    (sentence_piece_fields, {"unknown_token_id": 2**31}, "unknown_token_id"),
    (sentence_piece_fields, {"tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0, 0.0], "unknown_token_id": None,
                             "bos_token_id": None, "eos_token_id": None}, "neither 256 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "change", "said"), DAMAGE)
def test_damage_is_named(make, change, said):
    change = dict(change)
    for name in ("scores", "token_type"):  # of the right length where the length is not what is wrong
        if len(change.get(name) or ()) > 100:
            change[name] = change[name][:1] * len(make()[G + "tokens"])
    fields = make(**change)
    with pytest.raises(ModelLoadError, match=said):
        (codec_from_gguf(fields), end_ids(fields))


def test_any_damage_is_a_typed_error_or_none():
    """Guards against tracebacks: fields with anything at all in their place."""
    rng, refused = random.Random(0), 0
    anything = [None, 0, -1, 2**64 - 1, 1.5, float("inf"), True, "", "x", [], [0], ["", ""], [None], [[1]], "<0xZZ>"]
    for _ in range(300):
        fields = rng.choice([byte_level_fields, sentence_piece_fields])()
        name = rng.choice([*fields, "tokenizer.chat_template", G + "add_bos_token", G + "bos_token_id"])
        value = fields.get(name)
        if isinstance(value, list) and rng.random() < 0.7:
            value[rng.randrange(len(value))] = rng.choice(anything)
        else:
            fields[name] = rng.choice(anything)
        try:
            codec = codec_from_gguf(fields)
            end_ids(fields)
            codec.encode_chat([("user", "the theory 123")])
        except ModelLoadError:
            refused += 1
    assert refused > 150


# --- ends of turns, beginnings of prompts ------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"


def with_content(shown):
    return CHATML.replace("{{ m['content'] }}", shown)


def ends(fields, template):
    codec = codec_from_gguf(fields | ({"tokenizer.chat_template": template} if template else {}))
    return [codec.raw.id_to_token(i) for i in _end_ids("model", end_ids(fields), codec)]


@pytest.mark.parametrize(
    ("eos", "template", "want"),
    [
        ("<|endoftext|>", CHATML, ["<|endoftext|>", "<|im_end|>"]),
        ("<|im_end|>", CHATML, ["<|im_end|>"]),
        (None, CHATML, ["<|im_end|>"]),
        (None, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["<|endoftext|>"]),
        (None, None, ["<|endoftext|>"]),
        ("<|im_end|>", None, ["<|im_end|>"]),
        (None, "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}" + CHATML, ["<|im_end|>"]),
        (None, CHATML.replace("{% for", "{{ raise_exception('never') }}{% for"), ["<|endoftext|>"]),
        (None, with_content(PARTS), ["<|im_end|>"]),
    ],
)  # fmt: skip
def test_answers_end_where_the_model_or_its_template_says(eos, template, want, caplog):
    """Guards against an answer that runs into the next turn: eos is the end of a document in base models' files."""
    fields = byte_level_fields()
    fields[G + "eos_token_id"] = fields[G + "tokens"].index(eos or "t")
    if eos is None:
        del fields[G + "eos_token_id"]
    assert ends(fields, template) == want
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == (eos is None)
    assert all(want[0] in r.getMessage() for r in warned)


def test_a_model_without_any_end(caplog):
    fields = byte_level_fields(eos_token_id=None, token_type=None)
    assert ends(fields, None) == []
    assert "nothing but max_tokens" in caplog.text


def test_llama_2s_template_closes_turns_by_the_eos_token_that_its_file_need_not_name():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    assert ends(sentence_piece_fields(eos_token_id=None, bos_token_id=None), template) == ["</s>"]


def test_prompts_begin_with_bos_once_where_the_file_says_so():
    """Guards against Gemma's base models without <bos> (garbage), and against two of them."""
    fields = sentence_piece_fields(add_bos_token=True)
    said = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    silent = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    for template in ({}, said, silent):
        ids = codec_from_gguf(fields | template).encode_chat([("user", "the")])
        assert ids[0] == 1
        assert ids.count(1) == 1
    turn = codec_from_gguf(fields | said).encode_open_turn([], "the")
    assert turn == [1, *SentencePiece(fields, True).encode("the")]
    assert codec_from_gguf(fields).encode("the")[0] != 1
    for no_bos in (sentence_piece_fields(add_bos_token=False), byte_level_fields(bos_token_id=1)):
        assert codec_from_gguf(no_bos | silent).encode_chat([("user", "the")])[0] != 1
    assert codec_from_gguf(byte_level_fields("llama3", bos_token_id=264)).encode_chat([("user", "the")])[0] == 264


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_folders_without_a_template_begin_prompts_as_their_tokenizer_does(tmp_path, template):
    raw = codec_from_gguf(sentence_piece_fields()).raw
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(tmp_path)
    ids = codec_from_hub(str(tmp_path)).encode_chat([("user", "the")])
    assert ids.count(1) == (template is None)
    assert (ids[0] == 1) == (template is None)


def test_a_folder_that_names_no_eos_token_ends_where_its_template_ends_turns(tmp_path, caplog):
    fields = byte_level_fields()
    raw = codec_from_gguf(fields).raw
    PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=CHATML).save_pretrained(tmp_path)
    target = tiny_target(vocab=len(fields[G + "tokens"]))
    target.model.config.eos_token_id = target.model.generation_config.eos_token_id = None
    target.model.save_pretrained(tmp_path)
    assert load_target(str(tmp_path)).target.eos_token_ids == (fields[G + "tokens"].index("<|im_end|>"),)
    assert "<|im_end|>" in caplog.text


# --- chat templates ----------------------------------------------------------------------------------------------


def shown(template, messages, special=None):
    codec = codec_from_gguf(byte_level_fields())
    return TextCodec(codec.raw, template, special or {})._chat_text(messages)


TURNS = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye")]


@pytest.mark.parametrize(
    "template",
    [
        with_content("{% generation %}{{ m['content'] }}{% endgeneration %}"),
        with_content("{% generation -%} {{ m['content'] }} {%- endgeneration %}"),
        with_content(PARTS),
        with_content("{{ m.content[0].text }}"),
        with_content("{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"),
        with_content("{% if m.role == 'user' %}" + PARTS + "{% else %}{{ m.content }}{% endif %}"),
        with_content("{% if m.role == 'user' %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"),
    ],
)  # fmt: skip
def test_templates_show_what_was_said_however_they_ask_for_it(template):
    """Guards against a conversation of empty turns: in a string there are no parts."""
    assert shown(template, TURNS) == shown(CHATML, TURNS)


def test_generation_tags_within_loops_and_conditions():
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% if m.role == 'assistant' %}"
        "{% generation %}{% set ns.n = ns.n + 1 %}[{{ m.content }}{% if true %}!{% endif %}]{% endgeneration %}"
        "{% else %}{% if not m.content %}{% continue %}{% endif %}{{ m.content }};{% endif %}{% endfor %}{{ ns.n }}"
    )
    assert shown(template, TURNS) == "be kind;hi;[hello!]1"


def test_helpers_that_templates_call():
    template = (
        "{{ strftime_now('%Y')|length }}{{ {'b': 1, 'a': '<é>'}|tojson }}{{ [1]|tojson(indent=2) }}"
        "{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}"
        "{{ bos_token + eos_token }}{{ messages[0].content }}"
    )
    special = {"bos_token": "<s>", "eos_token": None}
    assert shown(template, [("user", "x")], special) == '4{"b": 1, "a": "<é>"}[\n  1\n]{"a":2,"b":1}<s>x'


@pytest.mark.parametrize(
    "template", ["{% if %}", "{% generation %}a", "{% endgeneration %}", "{{ x | nothing }}", "{{ " + "(" * 3000]
)
def test_templates_that_do_not_parse(template):
    with pytest.raises(ModelLoadError, match="does not parse"):
        shown(template, TURNS)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages.nothing.there }}"]
)
def test_templates_that_fail_when_used(template):
    codec = TextCodec(codec_from_gguf(byte_level_fields()).raw, template, {})
    assert codec.turn_end() is None
    with pytest.raises(InvalidRequestError, match="refuses"):
        codec.encode_chat(TURNS)
