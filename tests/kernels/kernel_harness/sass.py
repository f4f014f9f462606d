"""What a cubin's machine code shows: spills, the width of loads, tensor cores, and what loops wait for.

Nothing of it needs a GPU, and none of it is seen in the interpreter. The disassemblers come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from kernel_harness.loops import natural_loops

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)(.*?);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_WORK_OPCODE = re.compile(r"LD|ST|ATOM|RED|UTMA|[A-Z]*MMA")
_TENSOR_CORE_OPCODE = re.compile(r"(UTC)?[A-Z]*MMA")  # HMMA, QMMA, HGMMA, UTCHMMA


@dataclass(frozen=True)
class Instruction:
    """`@!P0 LDG.E.128 R4, desc[UR4][R2.64]` has the opcode LDG.E.128 and the predicate @!P0."""

    predicate: str  # empty: it is always executed
    opcode: str
    operands: str

    def is_a(self, opcode: str) -> bool:
        """`opcode` names the instruction and any of its modifiers: LDG.128 is LDG.E.LTC128B.128 too."""
        name, *modifiers = opcode.split(".")
        actual, *present = self.opcode.split(".")
        return name == actual and set(modifiers) <= set(present)


@dataclass(frozen=True)
class Code:
    """Instructions in the order of their addresses."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each opcode occurs, without modifiers."""
        return Counter(instruction.opcode.partition(".")[0] for instruction in self.instructions)

    def count(self, *opcodes: str) -> int:
        """How many instructions are one of these; see Instruction.is_a."""
        return sum(any(i.is_a(opcode) for opcode in opcodes) for i in self.instructions)

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of 16 bytes a thread, to registers or shared memory, or of whole tiles."""
        return self.count("LDG.128", "LDGSTS.128", "UTMALDG")

    @property
    def narrow_loads(self) -> int:
        """The other loads from global memory."""
        return self.count("LDG", "LDGSTS") - self.count("LDG.128", "LDGSTS.128")

    @property
    def tensor_core_instructions(self) -> int:
        """Of any generation and type."""
        return sum(n for opcode, n in self.opcodes.items() if _TENSOR_CORE_OPCODE.fullmatch(opcode))

    @property
    def committed_groups(self) -> int:
        """Groups of asynchronous copies to shared memory that are closed here."""
        return self.count("LDGDEPBAR")

    @property
    def groups_in_flight(self) -> int:
        """The most such groups that a wait leaves running: none, if copies and arithmetic never overlap."""
        waits = [i.operands for i in self.instructions if i.is_a("DEPBAR.LE")]
        return max((int(operands.split(",")[1], 16) for operands in waits), default=0)


@dataclass(frozen=True)
class Sass(Code):
    """All machine code of a kernel."""

    loops: tuple[Code, ...]  # the innermost of those that load, store or multiply
    registers: int  # of a thread
    stack_bytes: int  # of a thread

    @property
    def spills(self) -> int:
        """Loads and stores of the registers that a thread did not have."""
        return self.count("STL", "LDL")

    @property
    def main_loop(self) -> Code:
        """The innermost loop with the most instructions.

        Raises ValueError if there is none: loops of a constant number of turns may be unrolled.
        """
        if not self.loops:
            raise ValueError("the kernel has no loop")
        return max(self.loops, key=lambda loop: len(loop.instructions))


def disassemble(cubin: bytes) -> Sass:
    """Read a cubin that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        resources = _RESOURCES.search(_run("cuobjdump", "-res-usage", file.name))
    if resources is None:
        raise ValueError("cuobjdump does not say how many registers the kernel has")
    instructions, labels = _parse(text)
    instructions, labels = _parse(text)
    return Sass(
        tuple(instructions),
        loops=_innermost_loops(instructions, labels),
        registers=int(resources[1]),
        stack_bytes=int(resources[2]),
    )


def _parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and by label the index of the one behind it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(Instruction(match[1] or "", match[2], match[3].strip()))
    return instructions, labels


def _innermost_loops(instructions: list[Instruction], labels: dict[str, int]) -> tuple[Code, ...]:
    starts, successors = _basic_blocks(instructions, labels)
    loops = {}
    for blocks in natural_loops(successors):
        code = [i for block in sorted(blocks) for i in instructions[starts[block] : starts[block + 1]]]
        # Others only wait, for a copy or for the tensor cores.
        if any(_WORK_OPCODE.match(instruction.opcode) for instruction in code):
            loops[blocks] = Code(tuple(code))
    return tuple(code for blocks, code in loops.items() if not any(other < blocks for other in loops))


def _basic_blocks(
    instructions: list[Instruction], labels: dict[str, int]
) -> tuple[list[int], dict[int, list[int]]]:
    """Where blocks begin, with the end of the last one, and which blocks may follow each."""
    size = len(instructions)
    ends = [index + 1 for index, instruction in enumerate(instructions) if _leaves(instruction)]
    starts = sorted({0, size, *ends, *labels.values()})
    block_at = {start: block for block, start in enumerate(starts[:-1])}
    successors = {}
    for start, block in block_at.items():
        last = instructions[starts[block + 1] - 1]
        target = _TARGET.search(last.operands) if last.is_a("BRA") else None
        # `BRA.U UP0, ...` has its condition among the operands.
        always = not last.predicate and (target is None or last.operands == target[0])
        following = [] if _leaves(last) and always else [starts[block + 1]]
        if target:
            following.append(labels[target[1]])
        successors[block_at[start]] = [block_at[index] for index in following if index < size]
    return starts, successors


def _leaves(instruction: Instruction) -> bool:
    return instruction.is_a("BRA") or instruction.is_a("EXIT") or instruction.is_a("RET")


def _run(tool: str, *arguments: str) -> str:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("triton, which brings the disassemblers, is not installed")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
