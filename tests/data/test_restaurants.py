"""The generated descriptions of restaurants: every attribute is said, and dev prompts are new."""

import re

from dsee_jax import config, data
from dsee_jax.data import restaurants

SAID = {
    "familyFriendly": {"yes": "Children are welcome|suits families", "no": "not meant for children|not suit families"}
}


def test_texts_say_every_attribute():
    task = restaurants.load(60, 10)
    for split in (task.train, task.dev["dev"]):
        for prompt, text in zip(split.prompt, split.completion, strict=True):
            attributes = re.findall(r"(\w+)\[([^\]]*)\]", prompt)
            assert 4 <= len(attributes) <= 8
            for name, value in attributes:
                assert re.search(SAID[name][value] if name in SAID else re.escape(value), text), (prompt, text)
            assert re.fullmatch(r" [A-Z].*\.", text)
            assert not re.search(r"\ba [aeiouAEIOU]|\ban [^aeiouAEIOU]|  ", text)


def test_dev_prompts_are_new_and_have_several_references():
    task = restaurants.load(60, 10)
    assert len(set(task.train.prompt)) == 60
    assert len(set(task.dev["dev"].prompt)) == 10
    assert len(task.dev["dev"].prompt) == 10 * restaurants.REFERENCES
    assert not {*task.train.prompt} & {*task.dev["dev"].prompt}
    assert restaurants.load(60, 10) == task


def test_source_of_a_config_is_a_task_of_texts():
    settings = config.Config(data=config.DataConfig(source="restaurants", examples=8))
    assert config.model_task(settings) == "causal-lm"
    task = data.load(settings.data, seed=0, task="causal-lm")
    assert task.causal
    assert len(task.train.prompt) == 8
