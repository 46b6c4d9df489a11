"""help(flora.FloraConfig) is where a user looks a field up."""

import dataclasses
import pydoc

import peft

import flora


def test_help_shows_every_field_with_its_default_and_meaning():
    text = " ".join(pydoc.plain(pydoc.render_doc(flora.FloraConfig)).replace(" |", "").split())
    for field in dataclasses.fields(flora.FloraConfig):
        assert f"{field.name} (default " in text
        assert " ".join(field.metadata.get("help", "").split()) in text
    assert text.index("r (default 8)") < text.index(f"{dataclasses.fields(peft.PeftConfig)[0].name} (default")
