"""``python -m dsee_jax generate``: models, runs with their updates, and bad input."""

import json

import pytest

import decoders
import dsee_jax
import loras
import runs
from dsee_jax import __main__ as command
from dsee_jax.errors import InputError
from dsee_jax.export.run import export_run
from dsee_jax.generation import pipeline
from dsee_jax.train import loop

PROMPT = "the cat sees a"


def said(capsys, *arguments):
    assert command.main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_llama_continues_a_story_like_transformers(shared, capsys):
    """A real Llama; the text is that of Hugging Face's."""
    start = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    folder = shared / "data" / "stories260k"
    text = said(capsys, folder, "--prompt", start, "--new-tokens", "40")
    assert text.startswith(
        f"{start} One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )


def test_batch_equals_single_prompts_and_seed_decides_samples(tmp_path, capsys):
    """All prompts are one batch; each completion equals that of its prompt alone, as text and as JSON."""
    folder = decoders.write(tmp_path / "a")
    (tmp_path / "prompts.txt").write_text("no dog\nsome red bird runs\n")
    both = said(capsys, folder, "--prompt", PROMPT, "--file", tmp_path / "prompts.txt", "--new-tokens", 5).splitlines()
    assert [line.startswith(prompt) for line, prompt in zip(both, (PROMPT, "no dog", "some red"), strict=True)] == [
        True
    ] * 3
    alone = said(capsys, folder, "--prompt", "no dog", "--new-tokens", 5, "--json")
    assert json.loads(alone) == {"prompt": "no dog", "completion": both[1].removeprefix("no dog")}
    sample = ["--temperature", 1.0, "--top-k", 20, "--top-p", 0.9, "--new-tokens", 5]
    first, again, other = (said(capsys, folder, "--prompt", PROMPT, *sample, "--seed", s) for s in (1, 1, 2))
    assert first == again != other


def test_end_of_text_comes_from_the_files(tmp_path):
    """generation_config.json before config.json before the tokenizer; the completion excludes the end of text."""
    folder = decoders.write(tmp_path / "a", eos_token_id=9)
    assert pipeline.load(folder).ends == (9,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    writer = pipeline.load(folder)
    assert writer.ends == (7, 8)
    word = pipeline.complete(writer._replace(ends=()), [PROMPT], new_tokens=8)[0].split()[0]
    ending = writer._replace(ends=(3, writer.tokenizer.convert_tokens_to_ids(word)))
    assert pipeline.complete(ending, [PROMPT], new_tokens=8) == [""]
    assert pipeline.complete(writer, []) == []
    with pytest.raises(InputError, match="prompts is the text 'the cat'; expected a list of texts"):
        pipeline.complete(writer, "the cat")


def test_options_of_the_model_files_apply(tmp_path, caplog):
    """The repetition penalty of the files is the default; an unsupported option is named in a warning."""
    folder = decoders.write(tmp_path / "a")
    plain = pipeline.complete(pipeline.load(folder), [PROMPT], new_tokens=8)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.9, "min_length": 0}))
    assert not caplog.records
    writer = pipeline.load(folder)
    assert pipeline.complete(writer, [PROMPT], new_tokens=8) != plain
    assert pipeline.complete(writer, [PROMPT], new_tokens=8, repetition_penalty=1.0) == plain
    (folder / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3}))
    pipeline.load(folder)
    assert "no_repeat_ngram_size = 3, which is not supported" in caplog.text


@pytest.mark.slow
def test_adapter_of_peft_generates_the_text_of_the_folded_model(tmp_path, capsys):
    folder = decoders.write(tmp_path / "base")
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    lora = loras.write(tmp_path / "lora", loras.pairs(dict.fromkeys(names, (40, 24))))
    model, params = dsee_jax.load_pretrained(folder, "causal-lm")
    plain = dsee_jax.materialize(*dsee_jax.load_adapter(lora, model, params))
    dsee_jax.save_pretrained(tmp_path / "folded", model, plain, source=folder)
    arguments = ["--prompt", PROMPT, "--new-tokens", 6]
    tuned, folded, base = (
        said(capsys, *each, *arguments) for each in ([folder, "--adapter", lora], [tmp_path / "folded"], [folder])
    )
    assert tuned == folded != base


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.exhaustive)])
def test_run_and_its_exports_generate_equal_texts(tmp_path, family):
    """Updates attached from adapter/, exported as factors, and folded."""
    decoders.write(tmp_path / "base", tie_word_embeddings=True, **decoders.VARIANTS[family])
    runs.table(tmp_path / "data")
    options = {"train__epochs": 0.4, "train__retune_epochs": 0.2, "train__learning_rate": 0.3}
    loop.run(runs.config(tmp_path, **options), say=lambda text: None)
    export_run(tmp_path / "run", tmp_path / "factors", factors=True)
    export_run(tmp_path / "run", tmp_path / "folded")
    tuned, factors, folded, plain = (
        pipeline.load(tmp_path / name) for name in ("run", "factors", "folded", "run/model")
    )
    assert tuned.adapter
    assert factors.adapter
    assert not folded.adapter
    texts = [pipeline.complete(writer, [PROMPT, "no"], new_tokens=8) for writer in (tuned, factors, folded, plain)]
    assert texts[0] == texts[1] == texts[2] != texts[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt: give --prompt TEXT or --file FILE"),
        (["--file", "nothing.txt"], "nothing.txt: No such file or directory; expected a readable file"),
        (["--prompt", "a", "--beams", "0"], "beams is 0; expected 1 or more"),
        (["--prompt", "a", "--new-tokens", "31"], "more than the model's 32 positions: shorten the prompt"),
        (["--prompt", "the " * 40], "has 42 tokens and the model 32 positions, which leaves no room: shorten it"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan; expected a finite number"),
        (["--prompt", "a", "--repetition-penalty", "inf"], "repetition_penalty is inf; expected a finite number"),
        (["--prompt", "a", "--new-tokens", "2", "--beams", "1000000000"], "beams is 1000000000; expected at most"),
        (["--prompt", "a", "--seed", "4294967296"], "--seed is 4294967296; expected 0 to 4294967295"),
        (["--prompt", "a\udcff"], "is not UTF-8 text"),
        (["--file", "/dev/zero"], "/dev/zero is a device or a pipe"),
        (["--prompt", "a", "--beam", "2", "b"], "generate does not accept 'b'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    folder = decoders.write(tmp_path / "a")
    assert command.main(["generate", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_encoder_is_refused(tmp_path, capsys):
    runs.settings(tmp_path)
    assert command.main(["generate", str(tmp_path / "base"), "--prompt", "a"]) == 2
    assert "task 'causal-lm' is not supported" in capsys.readouterr().err


SETTINGS = {
    "text": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id, or a list of ids"),
    "nested": ({"eos_token_id": [[1]]}, "eos_token_id is [[1]]; expected a token id"),
    "mapping": ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}; expected a token id"),
    "large": ({"eos_token_id": 2**31}, "eos_token_id is 2147483648; expected a token id"),
    "true": ({"eos_token_id": True}, "eos_token_id is True; expected a token id"),
    "penalty": (
        {"repetition_penalty": "1.2"},
        "repetition_penalty is '1.2'; expected a number; correct generation_config",
    ),
    "penalties": ({"repetition_penalty": [1.2]}, "repetition_penalty is [1.2]; expected a number"),
    "zero": ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_value_of_the_model_files_is_one_line(tmp_path, capsys, name):
    settings, message = SETTINGS[name]
    folder = decoders.write(tmp_path / "a")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert command.main(["generate", str(folder), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_end_of_text_that_no_token_has_ends_nothing(tmp_path):
    """Some files write -1 for none."""
    folder = decoders.write(tmp_path / "a")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 3, 3]}))
    assert pipeline.load(folder).ends == (3,)
