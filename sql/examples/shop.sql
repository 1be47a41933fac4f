-- A shop, as an example for authors of triggers: three ways to tell the world what a transaction did, and one way for
-- the world to answer. Install it after `pgbridge migrate`, as a role that may create schemas and roles:
--
--   psql -v ON_ERROR_STOP=1 -d shop -f sql/examples/shop.sql
--
--   select shop.place_order(gen_random_uuid(), 1, '[{"sku": "TEA-GREEN", "quantity": 2}]');
--
-- What becomes an event, and how:
--
--   shop.order.placed       bridge.emit() in a trigger       an order reached the state 'placed'
--   shop.invoice.requested  bridge.emit() in a function      the worker `invoices` is to make a PDF
--   shop.invoice.rendered   bridge.emit() in a reply         the PDF stands, and its row says so
--   shop.payment.requested  bridge.emit() in a function      the worker `payments` is to charge the customer
--   shop.payment.done       bridge.emit() in a reply         what became of it: paid, declined, ...
--   shop.stock.updated      bridge.watch() of a table        a quantity changed, by whatever statement
--   Low Stock               plain pg_notify()                a quantity fell below its reorder level

begin;

create schema shop;

-- Tables -------------------------------------------------------------------------------------------------------------

create table shop.customers (
  id      bigint generated always as identity primary key,
  name    text not null,
  address text[] not null default '{}',
  email   text,
  tax_id  text,
  payment_method text not null default 'pm_card_visa'
);
comment on column shop.customers.payment_method is 'Stripe''s id of the card that the customer has left with us; by default one for tests.';

-- Money is numeric, never float: 0.1 + 0.2 must be 0.3 on an invoice.
create table shop.products (
  sku      text primary key,
  name     text not null,
  price    numeric(12, 2) not null check (price >= 0),
  tax_rate numeric(5, 2) not null check (tax_rate between 0 and 100)
);
comment on column shop.products.price is 'In euros, without tax.';
comment on column shop.products.tax_rate is 'In percent.';

create table shop.stock (
  sku           text primary key references shop.products,
  quantity      integer not null check (quantity >= 0),
  reorder_level integer not null default 40
);

create table shop.orders (
  id          bigint generated always as identity primary key,
  reference   uuid not null unique,
  customer_id bigint not null references shop.customers,
  placed_on   date not null default current_date,
  number      text not null unique generated always as (extract(year from placed_on)::text || '-' || (100000 + id)::text) stored,
  state       text not null default 'open' check (state in ('open', 'placed')),
  currency    text not null default 'EUR',
  net         numeric(14, 2),
  tax         numeric(14, 2),
  total       numeric(14, 2),
  check (state = 'open' or (net >= 0 and tax >= 0 and total = net + tax))
);
comment on column shop.orders.reference is 'Chosen by the client, so that an order sent twice is placed once.';

create table shop.order_lines (
  order_id    bigint not null references shop.orders,
  position    integer not null,
  sku         text not null references shop.products,
  description text not null,
  quantity    integer not null check (quantity > 0),
  unit_price  numeric(12, 2) not null,
  tax_rate    numeric(5, 2) not null,
  amount      numeric(14, 2) not null generated always as (round(quantity * unit_price, 2)) stored,
  primary key (order_id, position)
);

create table shop.invoices (
  number       text primary key references shop.orders (number),
  request      uuid not null unique,
  path         text,
  bytes        bigint,
  sha256       text,
  rendered_at  timestamptz
);
comment on column shop.invoices.request is 'The event that asked for the PDF; the worker''s reply names it.';

create table shop.payments (
  number         text primary key references shop.orders (number),
  request        uuid not null unique,
  status         text,
  payment_intent text,
  amount         bigint,
  code           text,
  done_at        timestamptz
);
comment on column shop.payments.request is 'The event that asked for the charge; the worker''s reply names it.';
comment on column shop.payments.status is 'Stripe''s, such as succeeded or requires_payment_method; null until it is known.';
comment on column shop.payments.amount is 'That moved, in cents.';

-- Placing an order ----------------------------------------------------------------------------------------------------
-- Everything in here commits or rolls back together, the events included: no invoice is rendered for an order that
-- was rolled back, and none is forgotten for one that was committed.

-- `items` is [{"sku": "...", "quantity": 1}, ...]. Returns the order's number. A client that lost its connection
-- cannot know whether its order was placed; it sends it again with the same reference, which gives the same number.
create function shop.place_order(reference uuid, customer bigint, items jsonb) returns text
  language plpgsql
  set search_path = shop, pg_temp
as $$
declare
  placed shop.orders;
  unknown text;
begin
  insert into orders (reference, customer_id) values (place_order.reference, customer)
    on conflict on constraint orders_reference_key do nothing
    returning * into placed;
  if placed.id is null then
    return (select o.number from orders as o where o.reference = place_order.reference);
  end if;

  select string_agg(item ->> 'sku', ', ') into unknown from jsonb_array_elements(items) as item
  where not exists (select from products as p where p.sku = item ->> 'sku');
  if unknown is not null or coalesce(jsonb_array_length(items), 0) = 0 then
    raise exception 'the shop does not sell: %', coalesce(unknown, 'nothing')
      using errcode = 'invalid_parameter_value', hint = 'See shop.products.';
  end if;
  -- Price and rate are copied: the invoice must not change when the product does.
  insert into order_lines (order_id, position, sku, description, quantity, unit_price, tax_rate)
    select placed.id, item.position, p.sku, p.name, item.quantity, p.price, p.tax_rate
    from rows from (jsonb_to_recordset(items) as (sku text, quantity integer)) with ordinality
         as item (sku, quantity, position)
    join products as p using (sku);

  -- Locked in one order by everybody, so that two orders of the same goods wait and never deadlock. The lock also
  -- gives the events about one product the order in which the changes commit.
  perform from stock as s where s.sku in (select l.sku from order_lines as l where l.order_id = placed.id)
  order by s.sku for update;
  update stock as s set quantity = s.quantity - sold.quantity
  from (select l.sku, sum(l.quantity)::integer as quantity from order_lines as l where l.order_id = placed.id group by l.sku)
       as sold
  where s.sku = sold.sku;

  -- Tax is rounded once per rate, as the invoice does it; the worker rejects an invoice whose total differs.
  update orders as o set state = 'placed', net = sums.net, tax = sums.tax, total = sums.net + sums.tax
  from (
    select sum(r.net) as net, sum(round(r.net * r.tax_rate / 100, 2)) as tax
    from (select l.tax_rate, sum(l.amount) as net from order_lines as l where l.order_id = placed.id group by l.tax_rate) as r
  ) as sums
  where o.id = placed.id;

  perform request_invoice(placed.id);
  perform request_payment(placed.id);
  return placed.number;
end
$$;

-- Way 1: bridge.emit() in a function. The payload is what a worker documents as its input (here workers/invoices/);
-- put everything into it that the worker needs, since it shall not have to read our tables. emit() returns the event's
-- id, which comes back with the reply.
create function shop.request_invoice(of_order bigint) returns void
  language sql
  set search_path = shop, pg_temp
as $$
  insert into invoices (number, request)
  select o.number, bridge.emit(
    'shop.invoice.requested',
    jsonb_build_object(
      'number', o.number,
      'issued_on', o.placed_on,
      'currency', o.currency,
      'seller', jsonb_build_object(
        'name', 'Tea & Cups', 'address', jsonb_build_array('Harbour Street 1', '20457 Hamburg'), 'tax_id', 'DE000000000'),
      'customer', jsonb_strip_nulls(jsonb_build_object(
        'name', c.name, 'address', to_jsonb(c.address), 'email', c.email, 'tax_id', c.tax_id)),
      -- Amounts travel as text: many JSON readers turn numbers into floats.
      'lines', (
        select jsonb_agg(jsonb_build_object(
            'description', l.description, 'quantity', l.quantity::text, 'unit_price', l.unit_price::text,
            'tax_rate', trim_scale(l.tax_rate)::text) order by l.position)
        from order_lines as l where l.order_id = o.id),
      'total', o.total::text
    ),
    -- The key: events with one key arrive in the order of their commits. So all events of one order have its number.
    o.number
  )
  from orders as o join customers as c on c.id = o.customer_id
  where o.id = of_order
$$;

-- A charge is asked for in the same way. The worker takes amounts in the currency's minor unit.
create function shop.request_payment(of_order bigint) returns void
  language sql
  set search_path = shop, pg_temp
as $$
  insert into payments (number, request)
  select o.number, bridge.emit(
    'shop.payment.requested',
    jsonb_build_object(
      'amount', (o.total * 100)::bigint, 'currency', lower(o.currency), 'payment_method', c.payment_method,
      'description', 'Order ' || o.number, 'metadata', jsonb_build_object('order', o.number)),
    o.number
  )
  from orders as o join customers as c on c.id = o.customer_id
  where o.id = of_order
$$;

-- The same in a trigger. The condition stands in WHEN, so that other updates cost nothing.
create function shop.announce_order() returns trigger
  language plpgsql
  set search_path = shop, pg_temp
as $$
begin
  perform bridge.emit(
    'shop.order.placed',
    jsonb_build_object('number', new.number, 'customer', new.customer_id, 'currency', new.currency,
                       'net', new.net::text, 'tax', new.tax::text, 'total', new.total::text),
    new.number
  );
  return null;
end
$$;

create trigger announce_order after update of state on shop.orders
  for each row when (new.state = 'placed' and old.state <> 'placed')
  execute function shop.announce_order();

-- Way 2: bridge.watch(). No code at all: every UPDATE that changes a quantity emits shop.stock.updated for each changed
-- row, with old and new values, keyed by the primary key. One INSERT a statement, however many rows it changes.
select bridge.watch('shop.stock', columns => '{sku,quantity}', operations => '{update}');

-- Way 3: plain pg_notify(), as older code has it. The bridge listens on the channel ([channels] in bridge.toml) and
-- carries the payload as it is; topic and channel are the same. But PostgreSQL keeps a notification for nobody: what is
-- sent while no bridge listens is gone. bridge.notify('Low Stock', ...) takes the same arguments and loses nothing.
create function shop.warn_of_low_stock() returns trigger
  language plpgsql
  set search_path = shop, pg_temp
as $$
begin
  perform pg_notify('Low Stock', json_build_object('sku', new.sku, 'quantity', new.quantity)::text);
  return null;
end
$$;

create trigger warn_of_low_stock after update of quantity on shop.stock
  for each row when (new.quantity < new.reorder_level and old.quantity >= old.reorder_level)
  execute function shop.warn_of_low_stock();

-- Fills up what is low; returns how many products that were. One statement, so one INSERT for all its events.
create function shop.restock(amount integer default 100) returns bigint
  language sql
  set search_path = shop, pg_temp
as $$
  with filled as (
    update stock set quantity = quantity + amount
    where sku in (select sku from stock where quantity < reorder_level order by sku for update)
    returning 1
  )
  select count(*) from filled
$$;

-- The reply ------------------------------------------------------------------------------------------------------------
-- The worker's result comes in here, in one transaction with the inbox row that says "handled". So it happens exactly
-- once per event, however often the broker delivers it. SECURITY DEFINER: workers have no rights on our tables.
create function shop.invoice_rendered(event_id uuid, result jsonb) returns void
  language plpgsql security definer
  set search_path = shop, pg_temp
as $$
declare
  stored shop.invoices;
begin
  update invoices as i
  set path = result ->> 'path', bytes = (result ->> 'bytes')::bigint, sha256 = result ->> 'sha256',
      rendered_at = clock_timestamp()
  where i.request = event_id
  returning * into stored;
  if not found then
    raise exception 'no invoice was requested by event %', event_id
      using errcode = 'no_data_found', hint = 'shop.request_invoice() stores the event''s id.';
  end if;
  -- An event of its own: a reply may set the next worker in motion.
  perform bridge.emit(
    'shop.invoice.rendered',
    jsonb_build_object('number', stored.number, 'path', stored.path, 'bytes', stored.bytes, 'sha256', stored.sha256),
    stored.number
  );
end
$$;

-- The same for payments. Stripe decided: a declined card is no error of the worker's, and what follows is up to the shop.
create function shop.payment_done(event_id uuid, result jsonb) returns void
  language plpgsql security definer
  set search_path = shop, pg_temp
as $$
declare
  stored shop.payments;
begin
  update payments as p
  set status = result ->> 'status', payment_intent = result ->> 'payment_intent', amount = (result ->> 'amount')::bigint,
      code = result ->> 'code', done_at = clock_timestamp()
  where p.request = event_id
  returning * into stored;
  if not found then
    raise exception 'no payment was requested by event %', event_id
      using errcode = 'no_data_found', hint = 'shop.request_payment() stores the event''s id.';
  end if;
  perform bridge.emit(
    'shop.payment.done',
    jsonb_build_object('number', stored.number, 'status', stored.status, 'amount', stored.amount, 'code', stored.code),
    stored.number
  );
end
$$;

-- Privileges -----------------------------------------------------------------------------------------------------------
-- Who sells may place orders and nothing else. bridge_emitter is what lets the functions above, which run with the
-- caller's rights, call bridge.emit(). Workers may call the reply.

do $$
begin
  if not exists (select from pg_roles where rolname = 'shop_seller') then
    create role shop_seller nologin in role bridge_emitter;
  end if;
end
$$;

revoke all on all routines in schema shop from public;
grant usage on schema shop to shop_seller, bridge_worker;
grant execute on function shop.place_order(uuid, bigint, jsonb), shop.request_invoice(bigint), shop.request_payment(bigint),
  shop.restock(integer)
  to shop_seller;
grant select on shop.customers, shop.products, shop.stock, shop.orders, shop.order_lines to shop_seller;
grant insert on shop.orders, shop.order_lines, shop.invoices, shop.payments to shop_seller;
grant update (state, net, tax, total) on shop.orders to shop_seller;
grant update (quantity) on shop.stock to shop_seller;
grant execute on function shop.invoice_rendered(uuid, jsonb), shop.payment_done(uuid, jsonb) to bridge_worker;

-- What is sold, and to whom -----------------------------------------------------------------------------------------

insert into shop.customers (name, address, email, tax_id) values
  ('Straßenbäckerei Müller & Söhne GmbH', '{"Königstraße 12","70173 Stuttgart","Germany"}', 'einkauf@baeckerei.example', 'DE000000001'),
  ('Žižkovská čajovna s.r.o.', '{"Husitská 7","130 00 Praha 3","Czechia"}', 'objednavky@cajovna.example', 'CZ00000002'),
  ('Ελαιώνας Α.Ε.', '{"Οδός Αθηνάς 31","105 54 Αθήνα","Greece"}', null, 'EL000000003'),
  ('Книгарня «Схід»', '{"вулиця Хрещатик 44","01001 Київ","Ukraine"}', 'kava@knyharnia.example', null),
  ('Phở Hà Nội', '{"Långgatan 5","413 03 Göteborg","Sweden"}', 'hej@pho.example', 'SE000000000501'),
  ('Łódzka Herbaciarnia', '{"ul. Piotrkowska 100","90-004 Łódź","Poland"}', null, 'PL0000000006'),
  ('Çiçekçi Lale Ltd. Şti.', '{"İstiklal Caddesi 8","34433 İstanbul","Türkiye"}', 'siparis@lale.example', null),
  ('Smørrebrød "Ø" ApS', '{"Nørregade 3, 1. tv.","1165 København K","Denmark"}', 'kontor@oe.example', 'DK00000008');

insert into shop.products (sku, name, price, tax_rate) values
  ('TEA-GREEN', 'Green tea, 100 g', 6.95, 7),
  ('TEA-BLACK', 'Black tea, 100 g', 5.49, 7),
  ('TEA-MATCHA', 'Matcha, 30 g', 18.33, 7),
  ('COFFEE', 'Café crème, 500 g', 9.99, 7),
  ('CUP', 'Cup “Müsli”, 0.3 l', 12.90, 19),
  ('POT', 'Teapot, cast iron, 1.2 l', 59.95, 19),
  ('SIEVE', 'Sieve № 3', 3.33, 19),
  ('GIFT', 'Gift card', 25.00, 0);

insert into shop.stock (sku, quantity) select sku, 120 from shop.products;

commit;
