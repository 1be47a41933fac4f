// An outbox relay on Node.js: pg reads pages, an amqplib confirm channel publishes them, the cursor is stored behind
// every page. The next page is read while earlier ones await their confirms; ended pages store the cursor in order.
"use strict";
const { Client } = require("pg");
const amqp = require("amqplib");

const [url, exchange, dsn, count] = process.argv.slice(2);
const TOTAL = Number(count);
const PAGE = 2000;
const PAGES_IN_FLIGHT = 8;
const SOURCE = "/bench/node";
const READ = {
  name: "read",
  text:
    "select id, event_id, topic, key, payload, content_type, created_at from bridge.outbox " +
    "where id > $1 order by id limit $2",
};

async function main() {
  const reader = new Client({ connectionString: dsn });
  const writer = new Client({ connectionString: dsn });
  await Promise.all([reader.connect(), writer.connect()]);
  await writer.query("create table if not exists public.node_cursor (name text primary key, mark bigint not null)");
  await writer.query("insert into public.node_cursor values ('bench', 0) on conflict (name) do update set mark = 0");
  const connection = await amqp.connect(url);
  const channel = await connection.createConfirmChannel();
  channel.on("return", (message) => fail(new Error(`returned: ${message.fields.routingKey}`)));
  connection.on("error", fail);
  channel.on("error", fail);

  const began = process.hrtime.bigint();
  const window = [];
  let mark = "0";
  let done = 0;
  while (done < TOTAL) {
    const { rows } = await reader.query({ ...READ, values: [mark, Math.min(PAGE, TOTAL - done)] });
    if (rows.length === 0) throw new Error(`the log ended after ${done} events`);
    mark = rows[rows.length - 1].id;
    done += rows.length;
    window.push(store(publish(channel, rows), window[window.length - 1], writer, mark));
    if (window.length >= PAGES_IN_FLIGHT) await window.shift();
  }
  await Promise.all(window);
  const seconds = Number(process.hrtime.bigint() - began) / 1e9;
  console.log(JSON.stringify({ messages: done, seconds }));
  await connection.close();
  await Promise.all([reader.end(), writer.end()]);
}

function publish(channel, rows) {
  return new Promise((resolve, reject) => {
    let left = rows.length;
    const confirmed = (error) => {
      if (error) reject(error);
      else if (--left === 0) resolve();
    };
    for (const row of rows) {
      channel.publish(
        exchange,
        row.topic,
        Buffer.from(row.payload),
        {
          mandatory: true,
          persistent: true,
          messageId: row.event_id,
          appId: SOURCE,
          contentType: row.content_type,
          timestamp: Math.floor(row.created_at.getTime() / 1000),
          headers: {
            cloudEvents_specversion: "1.0",
            cloudEvents_id: row.event_id,
            cloudEvents_type: row.topic,
            cloudEvents_source: SOURCE,
            cloudEvents_time: row.created_at.toISOString(),
            cloudEvents_subject: row.key,
          },
        },
        confirmed,
      );
    }
  });
}

async function store(published, before, writer, mark) {
  await published;
  await before;
  await writer.query({
    name: "store",
    text: "update public.node_cursor set mark = $1 where name = 'bench'",
    values: [mark],
  });
}

function fail(error) {
  console.error(error);
  process.exit(1);
}

main().catch(fail);
