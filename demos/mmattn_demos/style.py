"""How the demos look beyond the theme."""

CSS = """
.gradio-container {max-width: 1280px !important; margin: 0 auto !important}
.status {min-height: 1.6em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere}
.answer b {color: #15803d} .dark .answer b {color: #4ade80}
.answer mark {background: #fecaca; color: #7f1d1d !important; padding: 0 .2em; border-radius: .2em}
.answer {line-height: 1.6; overflow-wrap: anywhere}
.answer h4 {margin: .2em 0}
.pixel img {image-rendering: pixelated; outline: 1px solid var(--border-color-primary)}
.full-only:not(:has(img)) {display: none}
.upload img {image-rendering: pixelated; object-fit: contain !important}
.end {align-items: flex-end !important}
.end > button {margin-bottom: .7em}
.numbers {overflow-x: auto}
.numbers table {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums}
.numbers th, .numbers td {padding: .35em .6em; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary)}
.numbers tbody th {font-weight: 400}
.caption {font-size: .9em}
.bars {display: grid; gap: .5em}
.bars .track {background: var(--border-color-primary); border-radius: .3em; height: .9em}
.bars .fill {background: var(--color-accent); border-radius: .3em; height: .9em}
.bars .name {overflow-wrap: anywhere}
.gradio-container button {white-space: nowrap}
.gradio-container .grid-wrap {min-height: 0 !important; height: auto !important;
  max-height: none !important}
@media (max-width: 640px) {
  .gradio-container, .gradio-container .main {max-width: 100vw !important; box-sizing: border-box}
  .gradio-container .grid-container {grid-template-columns: repeat(2, 1fr) !important}
  .gradio-container .main {padding: .5em .75em !important}
}
"""
