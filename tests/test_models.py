"""Models: the built-in list, the page's list over it, and which model a request means."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lmarena_proxy import Catalog, ClientError, ConfigError, Model, read_catalog

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "models.json"
BUILT_IN = read_catalog(ROOT / "models.json", ["*"], [])
SHARED_NAMES = sorted(name for name, count in Counter(model.name for model in BUILT_IN).items() if count == 2)


def entry(model_id: str = "1", name: str = "m", image: Any = None, output: str = "text") -> dict[str, Any]:
    takes = {"text": True} | ({} if image is None else {"image": image})
    return {
        "id": model_id,
        "publicName": name,
        "capabilities": {"inputCapabilities": takes, "outputCapabilities": {output: True}},
    }


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "models.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_there_are_136_built_in_models() -> None:
    assert len(BUILT_IN) == 136
    assert {model.modality for model in BUILT_IN} == {"chat", "image", "video", "search"}
    assert repr(BUILT_IN) == "<Catalog of 136 models>"


@pytest.mark.skipif(not SHARED.exists(), reason="only where the project's shared folder is")
def test_the_built_in_list_is_the_shared_one_byte_for_byte() -> None:
    assert (ROOT / "models.json").read_bytes() == SHARED.read_bytes()


def test_six_names_stand_for_two_models_each() -> None:
    assert len(SHARED_NAMES) == 6
    assert max(Counter(model.name for model in BUILT_IN).values()) == 2


@pytest.mark.parametrize("name", SHARED_NAMES)
def test_the_image_or_its_absence_chooses_between_models_of_one_name(name: str) -> None:
    without, with_image = BUILT_IN.resolve(name, images=0), BUILT_IN.resolve(name, images=1)
    assert without.id != with_image.id
    assert not without.requires_image
    assert with_image.takes_image
    assert {model.id for model in BUILT_IN.named(name)} == {without.id, with_image.id}


def test_every_model_is_found_by_its_id_whatever_shares_its_name() -> None:
    for model in BUILT_IN:
        images = 1 if model.requires_image else 0
        assert BUILT_IN.resolve(model.id, images) is model


def test_an_unknown_name_gets_close_matches() -> None:
    known = next(iter(BUILT_IN)).name
    with pytest.raises(ClientError) as caught:
        BUILT_IN.resolve(f"{known}x", images=0)
    error = caught.value
    assert (error.http_status, error.error_code, error.param) == (404, "model_not_found", "model")
    assert known in error.message


@pytest.mark.parametrize("name", ["", "zzzzqqqq", "é" * 5000, "a/b"])
def test_a_name_like_no_other_is_pointed_to_the_list(name: str) -> None:
    with pytest.raises(ClientError, match="/v1/models"):
        BUILT_IN.resolve(name, images=0)


@pytest.mark.parametrize(
    ("image", "images", "said"),
    [
        (None, 1, "takes no images"),
        (False, 1, "takes no images"),
        ({"multipleImages": False}, 2, "takes one image, but got 2"),
        ({"requiresUpload": True}, 0, "works on an image"),
    ],
)
def test_images_that_a_model_does_not_take_are_the_clients_fault(image: Any, images: int, said: str) -> None:
    catalog = Catalog([Model.from_entry(entry(image=image))])
    with pytest.raises(ClientError, match=said) as caught:
        catalog.resolve("m", images, last_images=images)
    assert (caught.value.http_status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    ("image", "images"),
    [
        (None, 0),
        (True, 0),
        (True, 5),
        ({"multipleImages": True}, 5),
        ({"multipleImages": False}, 1),
        ({"requiresUpload": True}, 1),
        ({"requiresUpload": False}, 0),
    ],
)
def test_images_that_a_model_takes(image: Any, images: int) -> None:
    model = Model.from_entry(entry(image=image))
    assert Catalog([model]).resolve("m", images) is model


@pytest.mark.parametrize("output", ["text", "search", "image", "video", "web"])
def test_the_modality_is_the_output(output: str) -> None:
    expected = output if output in ("search", "image", "video") else "chat"
    assert Model.from_entry(entry(output=output)).modality == expected


def test_an_entry_needs_no_more_than_an_id_and_a_name() -> None:
    assert Model.from_entry({"id": "1", "publicName": "m"}) == Model("1", "m")
    sparse = {"id": "1", "publicName": "m", "organization": None, "capabilities": None}
    assert Model.from_entry(sparse) == Model("1", "m")


@pytest.mark.parametrize(
    "broken",
    [
        None,
        1,
        "m",
        [],
        {},
        {"id": "1"},
        {"publicName": "m"},
        {"id": "", "publicName": "m"},
        {"id": 1, "publicName": "m"},
    ],
)
def test_what_is_no_model_is_a_value_error(broken: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        Model.from_entry(broken)


@pytest.mark.parametrize("side", ["inputCapabilities", "outputCapabilities"])
@pytest.mark.parametrize("value", [["text"], "text", 1, True, None, {}])
def test_capabilities_of_another_shape_break_nothing(side: str, value: object) -> None:
    """The page's list is the site's to change; one odd entry must not cost the tab its connection."""
    assert Model.from_entry({"id": "1", "publicName": "m", "capabilities": {side: value}}) == Model("1", "m")


def test_a_merged_list_replaces_and_adds_and_drops_nothing() -> None:
    catalog = Catalog([Model("1", "one"), Model("2", "two")])
    assert catalog.merge([Model("2", "zwei"), Model("3", "three"), Model("1", "one")]) == 2
    assert [model.name for model in catalog] == ["one", "zwei", "three"]
    assert catalog.named("two") == []
    assert catalog.get("3") == Model("3", "three")


def test_an_empty_list_changes_nothing() -> None:
    catalog = Catalog([Model("1", "one")])
    assert catalog.merge([]) == 0
    assert [*catalog] == [Model("1", "one")]


def test_patterns_hold_for_names_and_ids_and_for_merged_models_too() -> None:
    catalog = Catalog(
        [Model("1", "gpt-a"), Model("2", "gpt-b"), Model("x3", "other")], ["gpt-*", "x*"], ["*-b"]
    )
    assert [model.id for model in catalog] == ["1", "x3"]
    catalog.merge([Model("4", "gpt-c"), Model("5", "new-b"), Model("6", "gpt-d-b")])
    assert [model.id for model in catalog] == ["1", "x3", "4"]


def test_reading_applies_the_patterns(tmp_path: Path) -> None:
    path = written(tmp_path, [entry("1", "a"), entry("2", "b")])
    assert [model.name for model in read_catalog(path, ["*"], ["b"])] == ["a"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"null",
        b"[1]",
        b'[{"id": "1"}]',
        b"\xff",
        b'["\xff"]',
        [{"id": 1, "publicName": ""}],
    ],
)
def test_a_bad_file_is_a_config_error(content: object, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_catalog(path, ["*"], [])
    assert (caught.value.key, caught.value.value) == ("models.path", str(path))


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.path"):
        read_catalog(tmp_path / "none.json", ["*"], [])


def test_patterns_that_leave_no_model_are_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_catalog(written(tmp_path, [entry()]), ["gpt-*"], [])
    assert (caught.value.key, caught.value.value) == ("models.include", ["gpt-*"])
