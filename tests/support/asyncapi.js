// Reads AsyncAPI documents, of which standard input has a JSON array of texts, with AsyncAPI's own parser. Prints what that says of
// each, and what it read, as JSON.
const { Parser } = require('@asyncapi/parser');
const { load } = require('js-yaml');

let input = '';
process.stdin.setEncoding('utf8');
process.stdin.on('data', (part) => { input += part; });
process.stdin.on('end', async () => {
  const parser = new Parser();
  const found = [];
  for (const text of JSON.parse(input)) {
    const diagnostics = await parser.validate(text);
    found.push({ diagnostics: diagnostics.map(({ code, message, path }) => ({ code, message, path })), read: load(text) });
  }
  process.stdout.write(JSON.stringify(found));
});
