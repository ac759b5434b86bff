"""Export the pictures of a report as files, for papers and slides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleb_cli.exporters.findings import Findings, gap_lines
from sleb_cli.exporters.report.drawing import need_matplotlib, png_file, svg_file
from sleb_cli.exporters.report.sections import plots_of, sections
from sleb_cli.units import plural
from sleb_plugins.exporter import ArtifactWriter, FileExporter, Pruning


class Figures(FileExporter):
    """A folder with every picture of the report as SVG and PNG."""

    name = "figures"
    description = "the report's pictures, as SVG and PNG"
    needs_model = False

    def export(self, pruning: Pruning, output: Path | None, writer: ArtifactWriter) -> Sequence[str]:
        """Write the folder.

        Raises:
            MachineError: the extra `report` is not installed.
        """
        need_matplotlib()
        findings = Findings(pruning)
        plots = plots_of(sections(findings))
        pictures = {f"{plot.name}.svg": svg_file(plot) for plot in plots}
        pictures |= {f"{plot.name}.png": png_file(plot) for plot in plots}
        writer.write_folder(pictures, output, ".figures")
        return [f"{plural(len(plots), 'picture')}: {', '.join(plot.name for plot in plots)}", *gap_lines(pruning)]
