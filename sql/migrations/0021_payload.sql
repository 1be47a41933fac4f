-- Payloads are not compressed by pglz, which an author's transaction waits for: 190 us for 10 kB of JSON, whose storing takes
-- 60. lz4 takes none of that time that can be measured, and a tenth more room; a server that was built
-- without it stores them as they are, in 1.6 times the room. What is in the log already stays as it is.
do $$
begin
  alter table bridge.outbox alter column payload set compression lz4;
exception when feature_not_supported then
  alter table bridge.outbox alter column payload set storage external;
end
$$;
