"""Models: the built-in list, the page's list over it, and which model a request means."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lmarena_proxy import Catalog, ClientError, ConfigError, Model, ModelsConfig, read_catalog

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "models.json"
BUILT_IN = read_catalog(ROOT / "models.json", ModelsConfig())
FIRST = "messages[0].content"
SHARED_NAMES = sorted(name for name, count in Counter(model.name for model in BUILT_IN).items() if count == 2)


def entry(model_id: str = "1", name: str = "m", image: Any = None, output: str = "text") -> dict[str, Any]:
    takes = {"text": True} | ({} if image is None else {"image": image})
    return {
        "id": model_id,
        "publicName": name,
        "capabilities": {"inputCapabilities": takes, "outputCapabilities": {output: True}},
    }


def bare(model: Model) -> Model:
    """A model without the site's own entry, which it keeps beside what was read from it."""
    return msgspec.structs.replace(model, entry={})


def resolved(catalog: Catalog, name: str, *images: int) -> Model:
    """The model for a request whose messages have so many images each."""
    return catalog.resolve(name, {f"messages[{index}].content": each for index, each in enumerate(images)})


def refused(catalog: Catalog, name: str, *images: int) -> ClientError:
    with pytest.raises(ClientError) as caught:
        resolved(catalog, name, *images)
    return caught.value


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
    without, with_image = resolved(BUILT_IN, name, 0), resolved(BUILT_IN, name, 1)
    assert without.id != with_image.id
    assert not without.requires_image
    assert with_image.takes_image
    assert {model.id for model in BUILT_IN.named(name)} == {without.id, with_image.id}


@pytest.mark.parametrize("name", SHARED_NAMES)
@pytest.mark.parametrize("images", [(1, 0), (0, 1), (1, 0, 1)])
def test_an_image_in_any_message_chooses(name: str, images: tuple[int, ...]) -> None:
    assert resolved(BUILT_IN, name, *images) is resolved(BUILT_IN, name, 1)


def test_every_model_is_found_by_its_id_whatever_shares_its_name() -> None:
    for model in BUILT_IN:
        assert resolved(BUILT_IN, model.id, int(model.requires_image)) is model


def test_an_unknown_name_gets_close_matches() -> None:
    known = next(iter(BUILT_IN)).name
    error = refused(BUILT_IN, f"{known}x", 0)
    assert (error.http_status, error.error_code, error.param) == (404, "model_not_found", "model")
    assert known in error.message


@pytest.mark.parametrize("name", ["", "zzzzqqqq", "é" * 5000, "a/b"])
def test_a_name_like_no_other_is_pointed_to_the_list(name: str) -> None:
    assert "/v1/models" in refused(BUILT_IN, name, 0).message


@pytest.mark.parametrize(
    ("image", "images", "said", "param"),
    [
        (None, [1], "takes no images", FIRST),
        (False, [1], "takes no images", FIRST),
        (None, [0, 0, 1], "takes no images", "messages[2].content"),
        (None, [1, 0], "takes no images", FIRST),
        ({"multipleImages": False}, [2], "takes one image in a message, but got 2", FIRST),
        ({"multipleImages": False}, [1, 3, 0], "but got 3", "messages[1].content"),
        ({"requiresUpload": True}, [0], "works on an image", FIRST),
        ({"requiresUpload": True}, [], "works on an image", "messages"),
    ],
)
def test_images_that_a_model_does_not_take_are_the_clients_fault(
    image: Any, images: list[int], said: str, param: str
) -> None:
    error = refused(Catalog([Model.from_entry(entry(image=image))]), "m", *images)
    assert said in error.message
    assert "'m'" in error.message
    assert (error.http_status, error.type, error.param) == (400, "invalid_request_error", param)


def test_an_error_about_images_names_where_they_stand_whatever_the_endpoint() -> None:
    catalog = Catalog([Model.from_entry(entry(image={"multipleImages": False}))])
    with pytest.raises(ClientError) as caught:
        catalog.resolve("m", {"image": 2})
    assert caught.value.param == "image"
    assert caught.value.message.startswith("image:")


@pytest.mark.parametrize(
    ("image", "images"),
    [
        (None, [0]),
        (None, []),
        (True, [0]),
        (True, [5]),
        (True, [5, 0, 5]),
        ({"multipleImages": True}, [5]),
        ({"multipleImages": False}, [1]),
        # Each message of a conversation may have one.
        ({"multipleImages": False}, [1, 0, 1]),
        ({"requiresUpload": True}, [1]),
        ({"requiresUpload": True}, [1, 0]),
        ({"requiresUpload": False}, [0]),
    ],
)
def test_images_that_a_model_takes(image: Any, images: list[int]) -> None:
    model = Model.from_entry(entry(image=image))
    assert resolved(Catalog([model]), "m", *images) is model


def test_a_model_that_takes_no_image_does_not_take_many() -> None:
    for image in (None, False, True, {}, {"multipleImages": False}, {"multipleImages": True}):
        model = Model.from_entry(entry(image=image))
        assert model.takes_many_images == (image is True or image == {"multipleImages": True})


@pytest.mark.parametrize("output", ["text", "search", "image", "video", "web"])
def test_the_modality_is_the_output(output: str) -> None:
    expected = output if output in ("search", "image", "video") else "chat"
    assert Model.from_entry(entry(output=output)).modality == expected


def test_an_entry_needs_no_more_than_an_id_and_a_name() -> None:
    assert bare(Model.from_entry({"id": "1", "publicName": "m"})) == Model("1", "m")
    sparse = {"id": "1", "publicName": "m", "organization": None, "capabilities": None}
    assert bare(Model.from_entry(sparse)) == Model("1", "m")


def test_what_a_model_takes_and_gives_is_every_capability_that_is_not_false() -> None:
    takes = {"text": True, "image": {"multipleImages": False}, "video": False, "file": None}
    model = Model.from_entry(
        {
            "id": "1",
            "publicName": "m",
            "organization": "acme",
            "capabilities": {
                "inputCapabilities": takes,
                "outputCapabilities": {"image": {"aspectRatios": ["1:1"]}, "text": True, "web": False},
            },
        }
    )
    expected = Model("1", "m", "image", ("text", "image"), ("image", "text"), False, False, "acme")
    assert bare(model) == expected
    assert model.takes_image


def test_a_model_keeps_its_entry_as_the_site_has_it() -> None:
    """The list that --update-models writes is made of these."""
    listed = json.loads((ROOT / "models.json").read_bytes())
    assert [model.entry for model in BUILT_IN] == listed


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
    model = Model.from_entry({"id": "1", "publicName": "m", "capabilities": {side: value}})
    assert bare(model) == Model("1", "m")


def test_a_merged_list_replaces_and_adds_and_drops_nothing() -> None:
    catalog = Catalog([Model("1", "one"), Model("2", "two")])
    changed = catalog.merge([Model("2", "zwei"), Model("3", "three"), Model("1", "one")])
    assert changed == [Model("2", "zwei"), Model("3", "three")]
    assert [model.name for model in catalog] == ["one", "zwei", "three"]
    assert catalog.named("two") == []
    assert catalog.get("3") == Model("3", "three")


def test_an_empty_list_changes_nothing() -> None:
    catalog = Catalog([Model("1", "one")])
    assert catalog.merge([]) == []
    assert [*catalog] == [Model("1", "one")]


def test_patterns_hold_for_names_and_ids_and_for_merged_models_too() -> None:
    config = ModelsConfig(include=("gpt-*", "x*"), exclude=("*-b",))
    catalog = Catalog([Model("1", "gpt-a"), Model("2", "gpt-b"), Model("x3", "other")], config)
    assert [model.id for model in catalog] == ["1", "x3"]
    unwanted = [Model("5", "new-b"), Model("6", "gpt-d-b")]
    assert catalog.merge([Model("4", "gpt-c"), *unwanted]) == [Model("4", "gpt-c")]
    assert [model.id for model in catalog] == ["1", "x3", "4"]


def test_reading_applies_the_patterns(tmp_path: Path) -> None:
    path = written(tmp_path, [entry("1", "a"), entry("2", "b")])
    assert [model.name for model in read_catalog(path, ModelsConfig(exclude=("b",)))] == ["a"]


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
        read_catalog(path, ModelsConfig())
    assert (caught.value.key, caught.value.value) == ("models.path", str(path))


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.path"):
        read_catalog(tmp_path / "none.json", ModelsConfig())


def test_patterns_that_leave_no_model_are_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_catalog(written(tmp_path, [entry()]), ModelsConfig(include=("gpt-*",)))
    assert (caught.value.key, caught.value.value) == ("models.include", ["gpt-*"])


def test_a_change_anywhere_in_the_sites_entry_is_a_change() -> None:
    before = Model.from_entry(entry() | {"rank": 1})
    after = Model.from_entry(entry() | {"rank": 2})
    catalog = Catalog([before])
    assert catalog.merge([Model.from_entry(entry() | {"rank": 1})]) == []
    assert catalog.merge([after]) == [after]
    assert [*catalog] == [after]


ALIASES = {
    "by-name": "gpt-a",
    "by-id": "id-b",
    "gpt-b": "gpt-a",
    "shared": "both",
    "nothing": "gpt-z",
    "by-alias": "by-name",
}
ALIASED = Catalog(
    [
        Model("id-a", "gpt-a"),
        Model("id-b", "gpt-b"),
        Model("id-text", "both"),
        Model("id-image", "both", inputs=("text", "image"), requires_image=True),
    ],
    ModelsConfig(aliases=ALIASES),
)


@pytest.mark.parametrize(("alias", "model_id"), [("by-name", "id-a"), ("by-id", "id-b")])
def test_an_alias_stands_for_a_name_or_an_id(alias: str, model_id: str) -> None:
    assert [model.id for model in ALIASED.named(alias)] == [model_id]
    assert resolved(ALIASED, alias, 0).id == model_id


def test_an_alias_wins_over_a_models_own_name_but_hides_no_id() -> None:
    assert resolved(ALIASED, "gpt-b", 0).id == "id-a"
    assert resolved(ALIASED, "id-b", 0).id == "id-b"


def test_the_image_chooses_through_an_alias_too() -> None:
    assert resolved(ALIASED, "shared", 0).id == "id-text"
    assert resolved(ALIASED, "shared", 1).id == "id-image"


@pytest.mark.parametrize("alias", ["nothing", "by-alias"])
def test_an_alias_of_what_is_no_model_is_unknown_and_says_what_it_stands_for(alias: str) -> None:
    """An alias of an alias is none, so no two can stand for each other."""
    assert ALIASED.named(alias) == []
    error = refused(ALIASED, alias, 0)
    assert (error.http_status, error.error_code, error.param) == (404, "model_not_found", "model")
    assert repr(alias) in error.message
    assert repr(ALIASES[alias]) in error.message
    assert "models.aliases" in error.message


def test_an_unknown_name_may_be_meant_for_an_alias() -> None:
    assert "by-name" in refused(ALIASED, "by-nam", 0).message
    assert "models.aliases" not in refused(ALIASED, "by-nam", 0).message


def test_an_error_about_images_speaks_of_the_name_that_the_client_used() -> None:
    assert "'by-name'" in refused(ALIASED, "by-name", 1).message


def test_names_are_each_listed_once_and_aliases_last() -> None:
    assert ALIASED.names() == ["gpt-a", "gpt-b", "both", "by-name", "by-id", "shared"]
    assert len(BUILT_IN.names()) == 136 - 6
    assert all(BUILT_IN.named(name) for name in BUILT_IN.names())


def test_every_listed_name_resolves() -> None:
    for name in ALIASED.names():
        assert resolved(ALIASED, name, 0) in ALIASED.named(name)


def test_an_alias_may_wait_for_the_pages_list() -> None:
    catalog = Catalog([Model("1", "one")], ModelsConfig(aliases={"uno": "one", "dos": "two"}))
    assert catalog.dangling_aliases() == ["dos"]
    assert catalog.names() == ["one", "uno"]
    catalog.merge([Model("2", "two")])
    assert catalog.dangling_aliases() == []
    assert catalog.names() == ["one", "two", "uno", "dos"]
    assert resolved(catalog, "dos", 0).id == "2"


def test_an_alias_brings_back_nothing_that_is_excluded() -> None:
    config = ModelsConfig(exclude=("two",), aliases={"dos": "two"})
    catalog = Catalog([Model("1", "one"), Model("2", "two")], config)
    assert catalog.dangling_aliases() == ["dos"]
    assert refused(catalog, "dos", 0).http_status == 404


def test_a_name_that_is_another_models_id_stands_for_that_model() -> None:
    catalog = Catalog([Model("1", "2"), Model("2", "two")])
    assert resolved(catalog, "2", 0).id == "2"
