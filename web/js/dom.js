/** Elements of the page. */

/** An element with a class, attributes and children. */
export function make(tag, className, attributes = {}, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A button with a text, a hint and what a click does. */
export function makeButton(className, text, hint, click) {
  const button = make("button", className, { type: "button", title: hint }, text);
  button.addEventListener("click", click);
  return button;
}

/** Set a text where it is another one, so that screen readers do not hear it again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
