-- bridge.emitted() for tests that roll back, with savepoints.
select plan(6);

select is_empty('select * from bridge.emitted()', 'nothing yet');
select bridge.emit('one', 'x');
savepoint kept;
select bridge.emit('two', 'x');
release kept;
savepoint undone;
select bridge.emit('gone', 'x');
select results_eq('select topic from bridge.emitted()', $$ values ('one'), ('two'), ('gone') $$, 'events of subtransactions count');
rollback to undone;
select results_eq('select topic from bridge.emitted()', $$ values ('one'), ('two') $$, 'those undone do not');
do $$ begin
  perform bridge.emit('three', 'x');
exception when others then null;
end $$;
select results_eq('select topic from bridge.emitted()', $$ values ('one'), ('two'), ('three') $$, 'nor do blocks with exceptions hide any');
select is((select count(*) from bridge.emitted() where topic = 'committed before'), 0::bigint, 'events of others are not ours');
select ok(exists (select from bridge.outbox where topic = 'committed before'), 'though they are in the log');
select * from finish();
