"""How the page looks: fonts of the system alone, so that nothing is fetched; light and dark as the browser asks."""

from typing import Any

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; padding: 12px 16px 32px !important; }
.head h1 { font-size: 1.5rem; font-weight: 700; margin: 4px 0 2px; letter-spacing: -0.01em; }
.head p { margin: 0 0 2px; }
.soft { color: var(--body-text-color-subdued) !important; font-size: 0.86rem; }
.gr-group .block { border-width: 0 !important; }
.promise, .numbers { padding: 10px 14px 12px; }
.dialbox, .dialbox > div, .dialbox .styler { background: var(--block-background-fill) !important; }
.promise p, .numbers p { margin: 0 0 6px; line-height: 1.4; }
.promise .label { display: block; font-size: 0.78rem; color: var(--body-text-color-subdued); }
.big { font-size: 1.08rem; }
.big b { font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.cost b { font-variant-numeric: tabular-nums; }
.note { color: var(--error-text-color, #b91c1c); }
svg.dial { width: 100%; max-width: 460px; height: auto; display: block; margin: 4px 0; }
svg.dial text { fill: var(--body-text-color-subdued); font-size: 11px; }
svg.dial .line { fill: none; stroke: var(--color-accent); stroke-width: 1.5; opacity: 0.6; }
svg.dial line { stroke: var(--body-text-color-subdued); stroke-width: 1.2; opacity: 0.6; }
svg.dial circle { fill: var(--body-text-color-subdued); }
svg.dial .on line { stroke: var(--color-accent); stroke-width: 2.5; opacity: 1; }
svg.dial .on circle { fill: var(--color-accent); }
.numbers dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 8px 14px; margin: 0; }
.numbers dt { font-size: 0.75rem; color: var(--body-text-color-subdued); }
.numbers dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.numbers progress { width: 100%; height: 6px; }
button:focus-visible, input:focus-visible, [tabindex]:focus-visible, select:focus-visible {
  outline: 3px solid var(--color-accent) !important; outline-offset: 2px;
}
@media (max-width: 640px) {
  .gradio-container { padding: 4px 2px 24px !important; }
  .gradio-container .main { padding: 8px !important; }
  .inputs, .outputs { min-width: 0 !important; flex-basis: 100% !important; }
  .outputs .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important; }
  .numbers dl { grid-template-columns: repeat(2, 1fr); }
}
"""


def theme() -> Any:
    """Gradio's plain theme in a blue, with the system's own fonts."""
    from gradio import themes  # pyright: ignore[reportMissingImports]

    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    plain = themes.Default(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    soft = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    info = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    return plain.set(**soft, **info)
