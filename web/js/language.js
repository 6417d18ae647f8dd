/** The page's language: what TEXTS says, and that the front end keeps the pack's texts of its nodes. */

import { TEXTS } from "./texts.js";
import { JA } from "./texts_ja.js";
import { KO } from "./texts_ko.js";
import { ZH } from "./texts_zh.js";

const LANGUAGES = { ja: JA, ko: KO, zh: ZH };
const ENGLISH = { ...TEXTS };
const OURS = "nodeDefs.AdaStateRollout.display_name";

const isGroup = (text) => typeof text === "object" && !Array.isArray(text);

/** Say TEXTS in the language of a locale; English stands where there is none, and where a text is missing. */
export function speak(locale) {
  const own = LANGUAGES[locale] ?? {};
  for (const [key, english] of Object.entries(ENGLISH))
    TEXTS[key] = isGroup(english) ? { ...english, ...own[key] } : own[key] ?? english;
}

/** The front end's messages, or null where they are not found. */
function messagesOf(page) {
  const app = page.querySelector("#vue-app")?.__vue_app__;
  const messages = app?._context?.provides?.[app.__VUE_I18N_SYMBOL__]?.global;
  return messages?.mergeLocaleMessage && messages.setLocaleMessage && messages.te ? messages : null;
}

/**
 * Some front ends load a language after the packs' texts of it and write over them (ComfyUI_frontend #6748; 1.32.9 does). Put this
 * pack's back whenever they are gone. `all` is what the host's /i18n says: locale -> messages.
 */
export function keepMessages(all, page = document) {
  const messages = messagesOf(page);
  if (!messages) return;
  const putBack = (locale) => {
    const { nodeDefs = {}, ...rest } = all[locale] ?? {};
    const own = Object.fromEntries(Object.entries(nodeDefs).filter(([name]) => name.startsWith("AdaState")));
    if (Object.keys(own).length && !messages.te(OURS, locale)) messages.mergeLocaleMessage(locale, { ...rest, nodeDefs: own });
  };
  const set = messages.setLocaleMessage;
  messages.setLocaleMessage = function (locale, ...given) {
    const done = set.call(this, locale, ...given);
    putBack(locale);
    return done;
  };
  Object.keys(all).forEach(putBack);
}
