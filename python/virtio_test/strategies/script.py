"""A case as a standalone Python script: plain calls of virtio_test that replay it, and exit 0 or 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .acts import Act, Add, Buffer, Copy, Fill, Look, Map, Pop, Publish, Push, Put, Race, Take, Unmap, Use, Write
from .case import AVAIL, INDEX, USED, Name, RingCase

__all__ = ["script"]

_PUT: Final = '''
def at(field, index=0):
    """Address and width of a field; `table.` is the indirect tables."""
    layout, name = (table, "desc." + field[6:]) if field.startswith("table.") else (ring, field)
    return layout.at(name, index), layout.fields()[name][1]


def put(field, value, index=0):
    address, width = at(field, index)
    memory.write(address, value.to_bytes(width, "little"))
'''

_DEVICE: Final = """
def pop(count):
    for _ in range(count):
        chain = end.pop()
        if chain is None:
            break
        chains.append(chain)


def push(which, written):
    if which < len(chains):
        end.push(chains[which], written)


def take(limit):
    try:
        used.extend((tokens.index(token), written) for token, written in driver.get_used_many(limit))
    except QueueViolation as violation:
        print("the legal driver found:", violation)
"""

_DRIVER: Final = """
def take(limit):
    for _ in range(limit):
        found = end.get_used()
        if found is None:
            break
        used.append((tokens.index(found[0]), found[1]))


def use(which, written):
    try:
        while (chain := device.pop()) is not None:
            theirs.append(chain)
        if which < len(theirs):
            device.push(theirs[which], min(written, theirs[which].writable))
    except QueueViolation as violation:
        print("the legal device found:", violation)
"""


def script(case: RingCase, policy: Name = "strict") -> str:
    """The script; it exits with 1 when something else comes of the case than what must, and says what it saw."""
    return "\n".join(_lines(case, policy)) + "\n"


def _lines(case: RingCase, policy: Name) -> Iterator[str]:
    driver = case.end == "driver"
    wanted = case.outcome(policy)
    yield f'"""{case}, judged by Policy.{policy}: exits with 0 when what must come of it comes of it."""'
    yield ""
    yield "import sys"
    yield ""
    names = ["DeviceQueue", "DriverQueue", "GuestMemory", "Policy", "QueueConfig", "QueueState", "RingLayout"]
    yield f"from virtio_test import {', '.join(names + ['Trace'] * case.traced)}"
    yield "from virtio_test.errors import QueueViolation"
    yield ""
    regions = ", ".join(f"({address:#x}, {size:#x})" for address, size, writable in case.regions if writable)
    traced = ", trace=trace" if case.traced else ""
    if case.traced:
        yield "trace = Trace()"
    yield f"memory = GuestMemory([{regions}]{traced})"
    for address, size, writable in case.regions:
        if not writable:
            yield f"memory.add_region({address:#x}, {size:#x}, writable=False)"
    yield f"ring = RingLayout.contiguous({case.size}, {case.ring:#x}, packed={case.packed})"
    yield f"table = RingLayout(32768, packed={case.packed}, desc={case.tables:#x})"
    yield ""
    yield _PUT
    yield _DRIVER if driver else _DEVICE
    yield ""
    yield from _queues(case, policy)
    yield "chains, used, tokens, theirs, rule, built = [], [], [], [], None, False"
    yield "try:"
    yield from (f"    {line}" for line in _body(case))
    yield "except QueueViolation as violation:"
    yield "    rule = violation.rule"
    yield "    print(violation)"
    yield ""
    yield "found = (len(used), rule, built)" if driver else "found = (len(chains), rule, built)"
    yield "handed = used" if driver else "handed = [chain.segments for chain in chains] if built else []"
    yield "print(*found)"
    yield "print(*handed, sep='\\n')"
    if wanted is None:
        return
    yield f"well = found == {tuple(wanted[:3])!r}"
    told = wanted.used if driver else wanted.segments
    if told is not None:
        plain = list(told) if driver else [list(each) for each in told]
        yield f"well = well and handed == {plain!r}"
    yield "sys.exit(0 if well else 1)"


def _queues(case: RingCase, policy: Name) -> Iterator[str]:
    config = case.areas
    features = case.features | (1 << 34) * case.packed
    judged = f"Policy.{policy}"
    if case.switches:
        judged = f"Policy({policy!r}, {', '.join(f'{name}={value!r}' for name, value in case.switches.items())})"
    yield f"legal = QueueConfig.from_layout(ring, index={INDEX}, features={features:#x})"
    places = [f"{name}={config.get(name, f'ring.{name}')}" for name in ("desc", "driver", "device")]
    yield "config = QueueConfig("
    yield f"    {config.get('size', 'ring.size')}, {', '.join(places)},"
    yield f"    index={INDEX}, features={features:#x}, policy={judged},"
    yield ")"
    yield f"start = QueueState({case.start:#x}, {case.start:#x})"
    state = case.state or (case.start, case.start)
    yield f"state = QueueState({state[0]:#x}, {state[1]:#x})"
    yield ""


def _begin(case: RingCase) -> Iterator[str]:
    if not case.packed:
        yield f'put("avail.idx", {case.start:#x})'
        yield f'put("used.idx", {case.start:#x})'
        return
    here, wrap = case.start & 0x7FFF, case.start >> 15
    slots = range(here) if wrap else range(here, case.size)
    if slots:
        yield f"for slot in {slots!r}:"
        yield f'    put("desc.flags", {AVAIL | USED:#x}, slot)'


def _body(case: RingCase) -> Iterator[str]:
    driver = case.end == "driver"
    if driver and (case.areas or case.state):
        yield "end = DriverQueue(memory, config, state=state)"
        yield "built = True"
        return
    yield "# The ring as a driver makes it."
    yield from _begin(case)
    tables = ""
    if case.tabled:
        tables = f", indirect={case.tables:#x}, indirect_entries={case.entries}"
    yield f"driver = DriverQueue(memory, {'config' if driver else 'legal'}, state=start{tables})"
    for buffer in case.buffers:
        yield from _buffer(buffer)
    yield "driver.publish()"
    if driver:
        yield "end, built = driver, True"
        yield "device = DeviceQueue(memory, legal, state=start)"
    if case.writes:
        yield "# What is changed in it."
    for change in case.writes:
        yield from _act(change)
    if not driver:
        yield "end = DeviceQueue(memory, config, state=state)"
        yield "built = True"
    if case.later:
        yield "# What happens then."
    for act in case.later:
        yield from _act(act)
    yield f"{'take' if driver else 'pop'}({2 * case.size + 2})"


def _buffer(buffer: Buffer) -> Iterator[str]:
    data = buffer.data
    for address, length in buffer.readable:
        if data:
            yield f"memory.write({address:#x}, bytes.fromhex({data[:length].hex()!r}))"
            data = data[length:]
    readable, writable = (
        ", ".join(f"({address:#x}, {length})" for address, length in half)
        for half in (buffer.readable, buffer.writable)
    )
    yield f"tokens.append(driver.add([{readable}], [{writable}], indirect={buffer.indirect}))"


def _act(act: Act) -> Iterator[str]:
    match act:
        case Put(field, value, place):
            yield f"put({field!r}, {value:#x}, {place})"
        case Fill(field, value, step, number):
            yield f"for place in range({number}):"
            yield f"    put({field!r}, {value:#x} + {step} * place, place)"
        case Write(address, data):
            yield f"memory.write({address:#x}, bytes.fromhex({data.hex()!r}))"
        case Copy(destination, source, length):
            yield f"memory.copy({destination:#x}, {source:#x}, {length})"
        case Map(address, size, writable):
            yield f"memory.add_region({address:#x}, {size:#x}, writable={writable})"
        case Unmap(address, size):
            yield f"memory.remove_region({address:#x}, {size:#x})"
        case Race(number, field, value, place):
            yield f"address, width = at({field!r}, {place})"
            yield f'trace.change_at(len(trace.log()) + {number}, address, ({value:#x}).to_bytes(width, "little"))'
        case Add(buffer):
            yield from _buffer(buffer)
        case Publish():
            yield "driver.publish()"
        case Use(which, written):
            yield f"use({which}, {written})"
        case Take(limit):
            yield f"take({limit})"
        case Look():
            yield "end.has_used() if end is driver else end.has_work()"
        case Pop(limit):
            yield f"pop({limit})"
        case Push(which, written):
            yield f"push({which}, {written})"
