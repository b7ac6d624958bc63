// Links: what a view shows stands in the address, so that the address shows it again.

const hashOf = (view, values) => {
  const kept = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const query = new URLSearchParams(kept).toString();
  return `#${view}${query && `?${query}`}`;
};

/** The view that an address names, and what it shows. */
export function here() {
  const [view, query] = location.hash.slice(1).split(/\?(.*)/s);
  return { view, values: Object.fromEntries(new URLSearchParams(query ?? "")) };
}

const tab = (view) => document.querySelector(`nav a[href^="#${view}"]`);

/** Write down what a view shows now; the way back to it leads there. */
export function remember(view, values) {
  const hash = hashOf(view, values);
  tab(view).setAttribute("href", hash);
  if (here().view === view && location.hash !== hash) history.replaceState(null, "", hash);
}

/** Go to a view and show something there. */
export function visit(view, values) {
  location.hash = hashOf(view, values);
}

export const current = (view) => {
  for (const each of document.querySelectorAll("nav a")) each.removeAttribute("aria-current");
  tab(view).setAttribute("aria-current", "page");
};
