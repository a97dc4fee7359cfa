"""How the page looks, and its search: a style sheet and a script, both inside the page."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --text: #1d1f23; --soft: #676c76;
  --line: #e3e3df; --accent: #2f6fb2; --mark: #ffe08a; --marked: #1d1f23; --bad: #b3382c;
  --chip: #eef2f6; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --card: #1f2228; --text: #e4e6ea;
  --soft: #9aa1ad; --line: #343840; --accent: #7cb4ee; --mark: #7a5d0b; --marked: #fff;
  --bad: #f0857a; --chip: #2a2f38; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 4.5rem; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; }
h4 { font-size: .72rem; margin: .9rem 0 .3rem; color: var(--soft); font-weight: 600;
  letter-spacing: .05em; text-transform: uppercase; }
p { margin: .3rem 0; max-width: 100ch; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.soft, figcaption, dt, .none { color: var(--soft); }
.bar { position: sticky; top: 0; z-index: 1; background: var(--page); padding: .7rem 0;
  margin-top: 1rem; border-bottom: 1px solid var(--line); display: flex; gap: 1rem;
  align-items: baseline; }
.bar input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .45rem .8rem; flex: 0 1 32rem; min-width: 0; }
.bar input:focus { outline: 2px solid var(--accent); outline-offset: -1px; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
details li { max-width: 80ch; margin: .25rem 0; }
.map { display: grid; grid-template-columns: auto 1fr; gap: 4px 12px; align-items: center; }
.map div { display: flex; flex-wrap: wrap; gap: 3px; }
.map .soft { font-size: .85rem; white-space: nowrap; }
.cell { display: block; width: 30px; height: 24px; border-radius: 4px; color: var(--text);
  border: 1px solid var(--line); font-size: .68rem; line-height: 22px; text-align: center; }
.cell.dead { border: 2px solid var(--bad); color: var(--bad); line-height: 20px; font-weight: 700; }
.curves { display: flex; flex-wrap: wrap; gap: .6rem 1.6rem; margin: .4rem 0 .9rem; }
figure { margin: 0; } figcaption { font-size: .78rem; }
svg { display: block; overflow: visible; } svg path { fill: none; stroke: var(--accent);
  stroke-width: 1.5; stroke-linejoin: round; } svg circle { fill: var(--accent); }
.curves b, .facts b { font-variant-numeric: tabular-nums; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(390px, 1fr)); gap: .9rem; }
@media (max-width: 460px) { .cards { grid-template-columns: 1fr; } }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem 1rem 1rem; min-width: 0; content-visibility: auto; 
  contain-intrinsic-size: 390px 430px; }
article:target { outline: 2px solid var(--accent); }
article.dead { border-color: var(--bad); }
article header { display: flex; gap: .6rem; align-items: baseline; }
.tag { font-size: .72rem; border-radius: 99px; padding: .05rem .55rem; background: var(--chip); }
.dead .tag { background: var(--bad); color: var(--card); }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .86rem; margin-top: .25rem; }
.tokens { display: flex; flex-wrap: wrap; gap: .3rem; }
.tokens span { background: var(--chip); border-radius: 6px; padding: .08rem .4rem;
  font-size: .86rem; max-width: 100%; overflow-wrap: anywhere; }
.tokens i { font-style: normal; color: var(--soft); font-size: .74rem; margin-left: .3rem; }
code, .context { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font-size: .86rem; unicode-bidi: isolate; }
.context { font-size: .76rem; line-height: 1.5; white-space: pre; overflow: hidden; display: flex; }
.context span { unicode-bidi: isolate; overflow: hidden; color: var(--soft); }
.context .before { flex: 0 0 62%; display: flex; justify-content: flex-end; }
.context .after { flex: 1 1 0; }
.context mark { background: var(--mark); color: var(--marked); border-radius: 3px; padding: 0 1px;
  unicode-bidi: isolate; }
.near { font-size: .86rem; display: flex; flex-wrap: wrap; gap: 0 1.2rem; }
.why { font-size: .86rem; margin: .2rem 0; } ul.why { padding-left: 1.1rem; }
[hidden] { display: none !important; }
"""

SCRIPT = """
const box = document.getElementById('search');
const cards = [...document.querySelectorAll('article')];
const texts = cards.map(card => [...card.children]
  .filter(part => part.className !== 'near')
  .map(part => part.textContent.toLowerCase()).join('\\n'));
function search() {
  const words = box.value.toLowerCase().match(/"[^"]+"|\\S+/g) || [];
  const wanted = words.map(word => word.replaceAll('"', ''));
  let found = 0;
  cards.forEach((card, i) => {
    card.hidden = !wanted.every(word => texts[i].includes(word));
    found += !card.hidden;
  });
  for (const layer of document.querySelectorAll('section'))
    layer.hidden = !layer.querySelector('article:not([hidden])');
  const what = `${found} of ${cards.length} experts`;
  document.getElementById('found').textContent = wanted.length ? what : '';
}
box.addEventListener('input', search);
document.addEventListener('keydown', event => {
  if (event.key === '/' && document.activeElement !== box) {
    event.preventDefault();
    box.focus();
  }
});
function follow() {
  const place = decodeURIComponent(location.hash.slice(1));
  if (place.startsWith('search=')) box.value = place.slice(7);
  const card = document.getElementById(place);
  if (card?.hidden) box.value = '';
  search();
  card?.scrollIntoView();
}
window.addEventListener('hashchange', follow);
follow();
"""
