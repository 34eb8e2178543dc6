// Values under the pointer (or the arrow keys) on charts, sliders that switch pictures, hints at wide tables.
document.documentElement.classList.add('js');

const tip = document.createElement('div');
tip.className = 'tip';
tip.hidden = true;
tip.setAttribute('role', 'status');
document.body.append(tip);

for (const chart of document.querySelectorAll('svg.chart')) {
  const dots = [...chart.querySelectorAll('.dot')];
  let at = -1;
  for (const title of chart.querySelectorAll('title')) title.remove(); // the tip shows the same
  const show = (i) => {
    dots[at]?.classList.remove('on');
    at = i;
    const dot = dots[i];
    tip.hidden = !dot;
    if (!dot) return;
    dot.classList.add('on');
    tip.textContent = dot.dataset.text;
    const box = dot.getBoundingClientRect(), wide = document.documentElement.clientWidth;
    const left = box.x + box.width / 2 - tip.offsetWidth / 2, above = box.y - tip.offsetHeight - 8;
    tip.style.left = Math.max(4, Math.min(left, wide - tip.offsetWidth - 4)) + 'px';
    tip.style.top = (above < 0 ? box.bottom + 8 : above) + 'px';
  };
  const nearest = (event) => {
    const box = chart.getBoundingClientRect(), scale = chart.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.x) * scale, y = (event.clientY - box.y) * scale;
    let best = -1, least = 40 * 40;
    dots.forEach((dot, i) => {
      const far = (dot.dataset.x - x) ** 2 + (dot.dataset.y - y) ** 2;
      if (far < least) [best, least] = [i, far];
    });
    show(best);
  };
  chart.addEventListener('pointermove', nearest);
  chart.addEventListener('pointerdown', nearest);
  chart.addEventListener('pointerleave', () => show(-1));
  chart.addEventListener('blur', () => show(-1));
  chart.addEventListener('keydown', (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step && dots.length) {
      event.preventDefault();
      show(at < 0 ? (step > 0 ? 0 : dots.length - 1) : (at + step + dots.length) % dots.length);
    }
    if (event.key === 'Escape') show(-1);
  });
}

for (const panel of document.querySelectorAll('.panel')) {
  const dials = [...panel.querySelectorAll('.dial input')], answers = [...panel.querySelectorAll('.answer')];
  const show = () => {
    const chosen = dials.map((dial) => dial.dataset.values.split(' ')[dial.value]);
    dials.forEach((dial, i) => {
      dial.setAttribute('aria-valuetext', chosen[i]);
      dial.parentNode.querySelector('output').textContent = chosen[i];
    });
    for (const answer of answers) answer.hidden = answer.dataset.key !== chosen.join(' ');
    panel.classList.toggle('empty', answers.every((answer) => answer.hidden));
  };
  for (const dial of dials) dial.addEventListener('input', show);
  if (dials.length) show();
}

const mark = () => {
  for (const table of document.querySelectorAll('.table')) {
    const box = table.querySelector('div');
    table.classList.toggle('wide', box.scrollWidth > box.clientWidth + 1);
  }
};
mark();
addEventListener('resize', mark);
