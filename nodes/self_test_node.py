"""AdaState Self Test: what this pack does on the card at hand, as a table for a bug report."""

from __future__ import annotations

from .host.api import io, schema, ui, widget
from .host.node import Node
from .host.progress import Progress
from .host.safely import free_memory
from .host.versions import version_lines
from .self_test.all_checks import all_checks
from .self_test.bench import Bench
from .self_test.outcome import run_checks, table


class SelfTestNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateSelfTest",
            display_name="AdaState Self Test",
            category="AdaState/analysis",
            description="Tries everything that the pack does on this machine's own device, with tiny models, in under two "
            "minutes. Its table is what a bug report asks for.",
            search_aliases=["selftest", "diagnose", "bug report", "benchmark", "AdaState"],
            is_output_node=True,
            inputs=[
                widget(
                    io.Boolean,
                    "speed",
                    default=True,
                    optional=True,
                    tooltip="Also time one block of Wan 2.1 1.3B at 832x480, of random weights.",
                )
            ],
            outputs=[io.String.Output("text", display_name="TEXT", tooltip="The table, a line for each check.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: bool) -> float:
        """Never equal to itself: it is asked for to be run."""
        return float("nan")

    @classmethod
    def execute(cls, speed: bool = True) -> io.NodeOutput:
        checks, rows = all_checks(speed), []
        progress, bench = Progress(len(checks)), Bench()
        try:
            for row in run_checks(checks, bench):
                rows.append(row)
                progress.step()
        finally:
            del bench
            free_memory()
        text = table(version_lines(), rows)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES = [SelfTestNode]
