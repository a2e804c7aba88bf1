"""Formats a survey of the pool as text, for `status` and `top`, for pipes and terminals. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len

from gpu_launcher.allocation.survey import DeviceSeen, DeviceState, PoolSurvey, label
from gpu_launcher.cli.table import Column, Line, Piece, Row, lay_out, wrap
from gpu_launcher.model import MILLIONTHS, DeviceKind, Share
from gpu_launcher.sizes import GIB, show_memory
from gpu_launcher.text import one_line, short_path
from gpu_launcher.wording import count, duration

if TYPE_CHECKING:
    from gpu_launcher.jobs.node_devices import NodeDevice
    from gpu_launcher.leases import DeviceUse, TicketView
    from gpu_launcher.model import Device, Owner, Request

DEVICES = (
    Column("DEVICE"),
    Column("NAME", optional=9),
    Column("MEMORY", right=True),
    Column("UTIL", right=True, optional=1),
    Column("SHARE"),
    Column("USER"),
    Column("PID", right=True, optional=2),
    Column("FOR", right=True),
    Column("LEFT", right=True, optional=3),
    Column("COMMAND"),
)
QUEUE = (
    Column("QUEUE"),
    Column("PRIORITY", right=True, optional=3),
    Column("NEEDS"),
    Column("USER"),
    Column("PID", right=True, optional=2),
    Column("FOR", right=True),
    Column("COMMAND"),
    Column("WHY IT WAITS"),
)
NODES = (
    Column("NODES"),
    Column("NAME", optional=2),
    Column("FOR", right=True, optional=1),
    Column("SWEEP"),
    Column("JOB"),
)
BARS_FROM = 120
"""Columns from which a live view has bars for memory and utilisation."""
BAR = 8
"""Columns of such a bar."""
_ABOUT_DEVICE = 4
"""Number of leading columns that describe the device itself."""


@dataclass(frozen=True, slots=True)
class StatusText:
    """The text in parts, each without empty lines around it."""

    head: list[Line]
    devices: list[Line]
    queue: list[Line]
    nodes: list[Line]
    """The devices of other machines; empty if there are none."""

    def lines(self) -> list[Line]:
        return [*self.head, [], *self.devices, [], *self.queue, *([[], *self.nodes] if self.nodes else ())]

    def within(self, height: int) -> list[Line]:
        """At most `height` lines: the first lines of each part, and the number of hidden lines."""
        if len(self.lines()) <= height:
            return self.lines()
        head = _first(self.head, max(2, height - 10))
        room = max(0, height - len(head) - 2)
        nodes = [[], *_first(self.nodes, max(2, room // 3))] if self.nodes else []
        room = max(0, room - len(nodes))
        for_queue = min(len(self.queue), max(room // 3, room - len(self.devices)))
        shown = [*head, [], *_first(self.devices, room - for_queue), [], *_first(self.queue, for_queue), *nodes]
        return shown[:height]


def render(
    survey: PoolSurvey, width: int | None, *, nodes: Sequence[NodeDevice] = (), brief: bool = False
) -> StatusText:
    """Format a survey, and the `nodes` of running sweeps, as text for people.

    `width` is the terminal's. For a pipe it is None, and nothing is omitted or wrapped. `brief` cuts lines that would
    otherwise be wrapped.
    """
    bars = brief and width is not None and width >= BARS_FROM
    rows = [row for group in _alike(survey.devices) for row in _device_rows(group, survey.time, bars=bars)]
    devices = lay_out(DEVICES, rows, width, one_line_each=brief)
    names = [] if any(text.strip() == "NAME" for text, _ in devices[0]) else list(_names(survey, width))
    return StatusText(
        head=[*_summary(survey, width), *names, *_notices(survey, None if brief else width)],
        devices=devices if rows else [[("no devices", "")]],
        queue=_queue(survey, width, brief),
        nodes=lay_out(NODES, [*map(_node_row, nodes)], width, one_line_each=brief) if nodes else [],
    )


def _node_row(seen: NodeDevice) -> Row:
    cells = (seen.device.label, one_line(seen.device.name))
    sweep = short_path(seen.sweep)
    if seen.is_silent:
        return Row((*cells, "", sweep, "lost contact"))
    if not seen.jobs:
        return Row((*cells, "", sweep, "idle"))
    jobs = "; ".join(f"#{job.number} {one_line(job.label)}".rstrip() for job in seen.jobs)
    return Row((*cells, duration(max(seen.seconds), tenths=False), sweep, jobs))


def _first(lines: list[Line], most: int) -> list[Line]:
    if len(lines) <= most:
        return lines
    hidden = len(lines) - max(0, most - 1)
    return [*lines[: max(0, most - 1)], [(f"... {count(hidden, 'more line')}; `gpu-launcher status` shows all", "dim")]]


def _summary(survey: PoolSurvey, width: int | None) -> list[Line]:
    where = f"pool {survey.pool.directory}"
    if survey.pool.view is None:
        where += " (not there yet: nothing is leased)"
    free = sum(seen.state is DeviceState.FREE for seen in survey.devices)
    waiting = len(survey.view.tickets)
    facts = f"{count(len(survey.devices), 'device')}, {free} free; {count(len(survey.view.leases), 'lease')}; " + (
        "1 ticket waits" if waiting == 1 else f"{waiting} tickets wait"
    )
    if width is not None and cell_len(f"{where}: {facts}") > width:
        return [[(where, "")], [(facts, "bold")]]
    return [[(f"{where}: ", ""), (facts, "bold")]]


def _names(survey: PoolSurvey, width: int | None) -> Iterator[Line]:
    gpus = [seen.device for seen in survey.devices if seen.device.kind in (DeviceKind.GPU, DeviceKind.MIG)]
    names = Counter(one_line(device.name) for device in gpus if device.name)
    several = [f"{number} x {name}" for name, number in names.items()]
    text = ", ".join(several if len(names) > 1 else names)
    for line in _fitted(text, width) if text else ():
        yield [(line, "dim")]


def _notices(survey: PoolSurvey, width: int | None) -> Iterator[Line]:
    for notice in survey.notices:
        for line in _fitted(f"note: {one_line(notice)}", width):
            yield [(line, "yellow")]


def _fitted(text: str, width: int | None) -> list[str]:
    return [text] if width is None else wrap(text, width)


def _alike(devices: Sequence[DeviceSeen]) -> list[list[DeviceSeen]]:
    """Group neighbouring CPU slots and simulated devices that are free, to show each group on one line."""
    groups: list[list[DeviceSeen]] = []
    for seen in devices:
        if groups and _plain(seen) and _plain(groups[-1][-1]) and _follows(groups[-1][-1].device, seen.device):
            groups[-1].append(seen)
        else:
            groups.append([seen])
    return groups


def _plain(seen: DeviceSeen) -> bool:
    return seen.state is DeviceState.FREE and seen.device.kind in (DeviceKind.CPU, DeviceKind.SIMULATED)


def _follows(one: Device, other: Device) -> bool:
    return (other.kind, other.index, other.memory) == (one.kind, one.index + 1, one.memory)


def _device_rows(group: list[DeviceSeen], now: float, *, bars: bool) -> Iterator[Row]:
    seen = group[0]
    name = label(seen.device)
    if len(group) > 1:
        first, _, index = name.rpartition(" ")
        name = f"{first}s {index}-{group[-1].device.index}"
    memory, utilisation = _memory(seen), _utilisation(seen)
    if bars and seen.condition is not None:
        used, total = seen.condition.memory_used, seen.device.memory
        memory = f"{_bar(used / total)} {memory}" if used is not None and total else memory
        busy = seen.condition.utilisation
        utilisation = f"{_bar(busy)} {utilisation:>4}" if busy is not None else utilisation
    about = (name, one_line(seen.device.name), memory, utilisation)
    shown = 0
    for hold in seen.holds:
        yield _hold_row(about, hold, now, shown)
        shown = _ABOUT_DEVICE
    if (said := _said(seen)) is not None:
        yield Row(about, said, shown)


def _said(seen: DeviceSeen) -> Piece | None:
    if seen.reason is not None:
        return (
            f"{seen.state.value}: it {one_line(seen.reason)}",
            "red" if seen.state is DeviceState.SET_ASIDE else "yellow",
        )
    if seen.strangers:
        strangers = " and ".join(one_line(process.described) for process in seen.strangers)
        how = "free, though" if seen.state is DeviceState.FREE else "also"
        return f"{how} used from outside the pool by {strangers}", "yellow"
    return ("free", "green") if seen.state is DeviceState.FREE else None


def _hold_row(about: tuple[str, ...], hold: DeviceUse, now: float, known: int) -> Row:
    lease = hold.lease
    if hold.share is None:
        return Row(about, ("held by a lease that cannot be read", "yellow"), known)
    left = "" if lease.left is None else duration(lease.left, tenths=False) if lease.left >= 0 else "overdue"
    user, pid, command = _owner(lease.owner)
    return Row((*about, show_share(hold.share), user, pid, _since(lease.since, now), left, command), None, known)


def _queue(survey: PoolSurvey, width: int | None, brief: bool) -> list[Line]:
    if not survey.view.tickets:
        return [[("the queue is empty", "dim" if width is not None else "")]]
    rows = []
    for number, (ticket, why) in enumerate(zip(survey.view.tickets, survey.reasons, strict=True), 1):
        cells = _ticket_cells(number, ticket, survey.time)
        if width is None:
            rows.append(Row((*cells, one_line(why))))
        else:
            rows += [Row(cells), Row(("",), (one_line(why), "yellow"))]
    if width is not None and all(ticket.priority == 0 for ticket in survey.view.tickets):
        rows = [Row((row.cells[0], "", *row.cells[2:]) if row.rest is None else row.cells, row.rest) for row in rows]
    return lay_out(QUEUE if width is None else QUEUE[:-1], rows, width, one_line_each=brief)


def _ticket_cells(number: int, ticket: TicketView, now: float) -> tuple[str, ...]:
    needs = "?" if ticket.demand is None else show_request(ticket.demand.request)
    user, pid, command = _owner(ticket.owner)
    return (f"#{number}", str(ticket.priority), needs, user, pid, _since(ticket.since, now), command)


def _owner(owner: Owner | None) -> tuple[str, str, str]:
    if owner is None:
        return "?", "?", "?"
    command = f"(suspended) {owner.command}" if owner.suspended else owner.command
    return one_line(owner.user), str(owner.pid or "?"), one_line(command)


def _since(since: float | None, now: float) -> str:
    return "" if since is None else duration(now - since, tenths=False)


def show_share(share: Share) -> str:
    """Format a share as `1`, `0.5` or `0.25, 20 GiB`."""
    part = f"{share.millionths / MILLIONTHS:.3g}"
    return f"{part}, {show_memory(share.memory)}" if share.memory else part


def show_request(request: Request) -> str:
    """Format a request as `2 devices`, `1 device, 40 GiB`, `0.5 of one` or `20 GiB of one`."""
    memory = show_memory(request.share.memory) if request.share.memory else ""
    if request.share.whole:
        return ", ".join(part for part in (count(request.gpus, "device"), memory) if part)
    part = f"{request.share.millionths / MILLIONTHS:.3g}" if request.share.millionths else ""
    return f"{', '.join(one for one in (part, memory) if one)} of one"


def _memory(seen: DeviceSeen) -> str:
    used = None if seen.condition is None else seen.condition.memory_used
    total = seen.device.memory
    if total is None:
        return "" if used is None else show_memory(used)
    whole = total / GIB
    of = f"{whole:.0f} GiB" if whole >= 10 else f"{whole:.1f} GiB"
    return of if used is None else f"{used / GIB:.1f}/{of}"


def _utilisation(seen: DeviceSeen) -> str:
    utilisation = None if seen.condition is None else seen.condition.utilisation
    return "" if utilisation is None else f"{utilisation:.0%}"


def _bar(part: float) -> str:
    filled = round(BAR * max(0.0, min(1.0, part)))
    return "━" * filled + "─" * (BAR - filled)
