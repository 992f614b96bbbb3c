"""Report of results, for `scc-fast report`: tables, figures and pages."""

try:
    import jinja2  # noqa: F401
    import pandas  # noqa: F401
except ImportError as error:
    raise ImportError(
        'scc-fast report needs pandas and Jinja2: pip install "scc_fast[evaluate]"'
    ) from error

from scc_fast.evaluate.report.page import make_report

__all__ = ["make_report"]
