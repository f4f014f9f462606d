from __future__ import annotations

import threading

from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.triton.outbox import Outbox

TIMEOUT_S = 30


def output(request_id: str, number: int) -> GenerationOutput:
    return GenerationOutput(request_id, "", (number,), None, 1, number)


def test_what_arrives_during_a_delivery_leaves_together() -> None:
    outbox = Outbox()
    delivered: list[list[GenerationOutput]] = []
    is_delivering, may_go_on = threading.Event(), threading.Event()

    def deliver(outputs: list[GenerationOutput]) -> None:
        delivered.append(outputs)
        is_delivering.set()
        assert may_go_on.wait(TIMEOUT_S)

    slow, other = outbox.mailbox(deliver), outbox.mailbox(delivered.append)
    slow.put(output("slow", 0))
    assert is_delivering.wait(TIMEOUT_S)
    for number in range(1, 100):
        slow.put(output("slow", number))
    other.put(output("other", 0))
    may_go_on.set()
    outbox.close()
    assert delivered == [
        [output("slow", 0)],
        [output("slow", number) for number in range(1, 100)],
        [output("other", 0)],
    ]


def test_nothing_is_lost_or_out_of_order() -> None:
    outbox = Outbox()
    delivered: dict[str, list[GenerationOutput]] = {str(i): [] for i in range(8)}
    mailboxes = {name: outbox.mailbox(outputs.extend) for name, outputs in delivered.items()}
    for number in range(20_000):
        name = str(number % 8)
        mailboxes[name].put(output(name, number))
    outbox.close()
    for i in range(8):
        assert delivered[str(i)] == [output(str(i), number) for number in range(i, 20_000, 8)]


def test_a_delivery_that_fails_harms_no_other() -> None:
    outbox = Outbox()
    delivered: list[list[GenerationOutput]] = []

    def fail(_: list[GenerationOutput]) -> None:
        raise OSError("gone")

    outbox.mailbox(fail).put(output("a", 0))
    outbox.mailbox(delivered.append).put(output("b", 0))
    outbox.close()
    assert delivered == [[output("b", 0)]]
