"""What a nursery raises: one failure of those that are looked for, or all that nobody may swallow."""

import pytest
import trio
import trio.testing

from lmarena_proxy import ApiError, ArenaError, BridgeError, ClientError, first_of, leaves


def group(*errors: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("", errors)


def test_leaves_are_those_of_nested_groups_in_their_order() -> None:
    one, two, three = ValueError("1"), ValueError("2"), ValueError("3")
    assert [*leaves(group(group(one), two, group(group(three))))] == [one, two, three]
    assert [*leaves(one)] == [one]


def test_the_first_failure_of_these_kinds_is_found_also_deep_inside() -> None:
    first, second = ClientError("first"), BridgeError("second")
    assert first_of(group(group(first), second), ApiError) is first
    assert first_of(group(second, first), ClientError, BridgeError) is second


@pytest.mark.parametrize("other", [KeyError("a bug"), KeyboardInterrupt(), ArenaError("of another kind")])
def test_whatever_else_there_is_comes_instead(other: BaseException) -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        first_of(group(ClientError("one"), group(other)), ClientError)
    assert [*leaves(raised.value)] == [other]


async def test_a_cancellation_beside_a_failure_goes_on() -> None:
    async def fail_late() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ClientError("while it was cancelled")

    with trio.move_on_after(5), trio.CancelScope() as scope:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_late)
                nursery.start_soon(trio.sleep_forever)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        except BaseExceptionGroup as raised:
            first_of(raised, ClientError)
        pytest.fail("the cancellation ended here")
    assert scope.cancelled_caught
